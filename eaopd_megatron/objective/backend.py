"""Who does the work on the logits: the Triton kernels, or the torch code that is their oracle and stands in for them.

The kernels are for CUDA tensors of fp32, bf16 or fp16 whose rows lie without gaps, where Triton is installed; torch on
CUDA brings it along. Everything else, fp64 too, is torch's. Triton is imported with the first use, never before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
_wanted: bool | None = None


@contextlib.contextmanager
def kernels_wanted(wanted: bool) -> Iterator[None]:
    """For tests: inside, the kernels do the work that they can do, or none of it, whatever the device.

    On CPU tensors they run in Triton's interpreter alone: TRITON_INTERPRET=1 must be set before Triton is imported.
    """
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def kernels_for(*logits: Tensor | None) -> ModuleType | None:
    """`launch`, which starts the kernels, where they serve all of ``logits`` (None: absent); None where torch does."""
    given = [value for value in logits if value is not None]
    wanted = all(value.is_cuda for value in given) if _wanted is None else _wanted
    if not wanted or not all(_served(value) for value in given) or not _installed():
        return None
    return importlib.import_module(".triton_launch", __package__)


def _served(logits: Tensor) -> bool:
    return logits.dtype in STORAGE and (logits.shape[1] == 1 or logits.stride(1) == 1)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
