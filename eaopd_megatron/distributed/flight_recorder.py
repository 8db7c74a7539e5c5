"""PyTorch's flight recorder: the last collectives of every rank, on the disk when a run fails.

RUN/failures/collectives/rank_N is a pickle of torch's: `entries` names each collective that the rank entered, with its
shapes, group and stack. For NCCL's groups

    python -m torch.distributed.flight_recorder.fr_trace RUN/failures/collectives --prefix rank_

compares the ranks (gloo's groups it cannot tell apart).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

PREFIX = "rank_"


def record(folder: Path, collectives: int) -> None:
    """Remember so many collectives of this rank; 0 remembers none. To be called before the process group is made.

    Where NCCL itself ends a process after a time-out, it writes to the same files. What the environment says already
    stays.
    """
    if not collectives:
        return
    if torch.cuda.is_available():
        folder.mkdir(parents=True, exist_ok=True)  # NCCL makes none
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(collectives))
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / PREFIX))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def dump(folder: Path, rank: int) -> None:
    """Write what this rank remembers, if it records. From any thread, also while the main one waits in a collective."""
    if not int(os.environ.get("TORCH_FR_BUFFER_SIZE", "0")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{PREFIX}{rank}.{threading.get_ident()}"  # two threads may notice the failure
    partial.write_bytes(_trace())
    partial.replace(folder / f"{PREFIX}{rank}")


def _trace() -> bytes:
    """torch's own record, pickled as its analyser wants it: the one use of this private call."""
    from torch._C import _distributed_c10d

    return bytes(_distributed_c10d._dump_fr_trace())  # type: ignore[attr-defined]
