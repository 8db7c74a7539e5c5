"""Write random models with the shapes of Qwen3-0.6B and 1.7B in bf16, and the recipes of the check.

Beside the whole models there are shallow ones of four layers, since a checkpoint of the whole student takes 8 GB.

python tools/gpu_check/make_models.py FOLDER [--small]      --small: a few thousand parameters, for a rehearsal on a CPU
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3Config

PAIR = Path(__file__).resolve().parents[2] / "recipes" / "countdown"  # lends its tokenizer
VOCAB_SIZE = 151_936
SHALLOW_LAYERS = 4
COMMON = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
SHAPES = {
    "student": COMMON | {"hidden_size": 1024, "intermediate_size": 3072},
    "teacher": COMMON | {"hidden_size": 2048, "intermediate_size": 6144},
}
SMALL = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 1024,
}


def write_model(folder: Path, role: str, shape: dict[str, Any]) -> None:
    """Write one Hugging Face folder with random weights; the teacher's seed differs from the student's."""
    source = PAIR / role
    config = json.loads((source / "config.json").read_text()) | shape
    for name in ("layer_types", "max_window_layers"):
        config.pop(name, None)
    torch.manual_seed(list(SHAPES).index(role))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def recipe(folder: Path, models: str, response_tokens: int, small: bool) -> dict[str, Any]:
    return {
        "run": {"folder": str(folder / "runs" / "real_width"), "save_interval": 0},
        "student": {"model": str(folder / f"{models}student"), "precision": "bf16"},
        "teacher": {"model": str(folder / f"{models}teacher"), "precision": "bf16"},
        "data": {"source": "countdown", "template": "raw"},
        "objective": {"preset": "eopd"},
        "rollout": {"max_response_tokens": 8 if small else response_tokens},
        "train": {
            "iterations": 3,
            "prompts_per_iteration": 8 if small else 64,
            "mini_batch": 4 if small else 16,
            "micro_batch_tokens": 128 if small else 8192,
        },
        "optimizer": {"lr": 1e-5, "schedule": "constant"},
        "reporting": {"tensorboard": False},
    }


def main() -> None:
    folder, small = Path(sys.argv[1]).resolve(), "--small" in sys.argv
    for role, shape in SHAPES.items():
        shape |= SMALL if small else {}
        write_model(folder / role, role, shape)
        write_model(folder / f"shallow_{role}", role, shape | {"num_hidden_layers": SHALLOW_LAYERS})
    for name, models, response_tokens in (("recipe", "", 256), ("shallow", "shallow_", 64)):
        text = yaml.safe_dump(recipe(folder, models, response_tokens, small))
        (folder / f"{name}.yaml").write_text(text)
    print(f"random models and recipes in {folder}")


if __name__ == "__main__":
    main()
