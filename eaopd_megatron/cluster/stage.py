"""Model folders on a node's own disk, copied once, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from eaopd_megatron.errors import UserError


def staged(model: Path, stage: Path) -> Path:
    """Where the copy of `model` lies: the same on every node."""
    return stage / f"{model.name}-{hashlib.sha256(str(model).encode()).hexdigest()[:12]}"


def stage_model(model: Path, stage: Path) -> Path:
    """Copies the folder where it is not there yet; jobs on the same node wait for each other. Raises UserError."""
    there = staged(model, stage)
    partial = there.with_name(f".{there.name}.partial")
    try:
        stage.mkdir(parents=True, exist_ok=True)
        with (stage / f".{there.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not there.exists():
                needed = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
                free = shutil.disk_usage(stage).free
                if needed > free:
                    raise UserError(
                        f"EAOPD_STAGE: {stage} has {free / 2**30:.1f} GiB free, {model} takes {needed / 2**30:.1f}"
                    )
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(model, partial)
                os.replace(partial, there)
    except OSError as error:
        raise UserError(f"EAOPD_STAGE: {model} could not be copied to {stage}: {error.strerror or error}") from None
    return there
