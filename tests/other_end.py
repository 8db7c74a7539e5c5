"""The Countdown teacher as if it had been trained to end with another id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from eaopd_megatron.data.countdown import EOS_ID

RECIPE = Path(__file__).resolve().parents[1] / "recipes/countdown/eopd.yaml"
OTHER_ID = 111


def teacher_with_another_end(folder: Path) -> Path:
    """Writes the folder, and returns it."""
    shutil.copytree(RECIPE.parent / "teacher", folder)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"].clone()
    head[[EOS_ID, OTHER_ID]] = head[[OTHER_ID, EOS_ID]]
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": OTHER_ID}))
    return folder
