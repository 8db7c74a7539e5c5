"""A model's sizes from its folder, from the hub (config.json alone), or from a built-in table."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.models.shapes import ModelShape

TIMEOUT = 10.0  # seconds for the hub
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DENSE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_QWEN3: dict[str, tuple[tuple[int, ...], bool]] = {  # values of the names above; whether embeddings are tied
    "0.6B": ((28, 1024, 16, 8, 3072), True),
    "1.7B": ((28, 2048, 16, 8, 6144), True),
    "4B": ((36, 2560, 32, 8, 9728), True),
    "8B": ((36, 4096, 32, 8, 12288), False),
    "14B": ((40, 5120, 40, 8, 17408), False),
    "32B": ((64, 5120, 64, 8, 25600), False),
    "30B-A3B": ((48, 2048, 32, 4, 6144, 128, 8, 768), False),
    "235B-A22B": ((94, 4096, 64, 4, 12288, 128, 8, 1536), False),
}


@dataclass(frozen=True)
class ModelInfo:
    """A model's name in the recipe, its sizes, and where they were read."""

    name: str
    shape: ModelShape
    source: str


def find_model(name: str, key: str) -> ModelInfo:
    """The model that a recipe's key names: a folder with config.json, or a hub id `owner/name`.

    Where the hub cannot be asked, the built-in table answers for the Qwen3 models that it has. UserError, beginning
    with the key, where there is no configuration, or one that cannot be planned.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return ModelInfo(name, ModelShape.of(_read(folder / "config.json", key), f"{key}: {folder}"), "config.json")
    if folder.exists() or not _HUB_ID.fullmatch(name):
        raise UserError(f"{key}: {name} is no folder with a config.json and no hub id owner/name")
    config, why = _from_hub(name)
    if config is not None:
        return ModelInfo(name, ModelShape.of(config, f"{key}: {name}"), "config.json from the hub")
    if (known := built_in_shape(name)) is None:
        raise UserError(f"{key}: there is no folder {name}, {why}, and it is not in the built-in table")
    return ModelInfo(name, known, f"built-in table: {why}")


def built_in_shape(name: str) -> ModelShape | None:
    """The sizes of Qwen/Qwen3-..., base and chat model alike; none for any other name."""
    found = re.fullmatch(r"Qwen/Qwen3-(.+?)(-Base)?", name)
    if found is None or found[1] not in _QWEN3:
        return None
    values, tied = _QWEN3[found[1]]
    config: dict[str, Any] = dict(zip((*_DENSE, *_EXPERTS), values, strict=False))
    config |= {"vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": tied}
    return ModelShape.of({"model_type": "qwen3_moe" if "num_experts" in config else "qwen3"} | config, name)


def _read(file: Path, key: str) -> Any:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{key}: {file.parent} has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{key}: {file} holds no JSON object")
    return content


def _from_hub(name: str) -> tuple[dict[str, Any] | None, str]:
    """The configuration from the hub's cache or the hub, asked once; or none and the reason."""
    import httpx
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
        return _read(Path(cached), name), ""
    if constants.HF_HUB_OFFLINE:
        return None, "HF_HUB_OFFLINE is set"
    try:
        url = hf_hub_url(name, "config.json")
        answer = httpx.get(url, headers=build_hf_headers(), follow_redirects=True, timeout=TIMEOUT)
        if answer.status_code != httpx.codes.OK:
            return None, f"the Hugging Face hub answers {answer.status_code}"
        config = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        return None, f"the Hugging Face hub cannot be reached ({type(error).__name__})"
    return (config, "") if isinstance(config, dict) else (None, "the Hugging Face hub's config.json is broken")
