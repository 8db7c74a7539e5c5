"""Let the package's own code, and nothing else, see a CUDA device of capability 9.0 when this is imported."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch


def _asks() -> bool:
    """Whether the caller's caller is in the package."""
    return "transformer_engine" in sys._getframe(2).f_globals.get("__name__", "").split(".")


_is_available: Any = torch.cuda.is_available
_is_cuda: Any = torch.Tensor.is_cuda
_DEVICE = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="emulated", total_memory=80 << 30)


def _available() -> bool:
    return _asks() or _is_available()


def _on_cuda(self: torch.Tensor) -> bool:
    return _asks() or _is_cuda.__get__(self)


_SEEN: dict[Any, dict[str, Any]] = {
    torch.cuda: {
        "is_available": _available,
        "get_device_properties": lambda *device: _DEVICE,
        "get_device_capability": lambda *device: (9, 0),
        "is_current_stream_capturing": lambda: False,
    },
    torch.Tensor: {"is_cuda": property(_on_cuda), "cuda": lambda self, *args, **options: self},
}
for _owner, _names in _SEEN.items():
    for _name, _value in _names.items():
        setattr(_owner, _name, _value)
