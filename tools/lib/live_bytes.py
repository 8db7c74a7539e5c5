"""Counts the bytes of tensors that are alive, exactly, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside, `now()` and `peak` are the bytes of storages that were made inside and are alive, or were at the most.

    What existed before does not count. Memory that an operator takes and gives back in itself is not seen.
    """

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        """Bytes alive at this moment."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        new = False
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                key = storage._cdata
                if storage.data_ptr() not in self._known and key not in self._alive:
                    self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
                    new = True
        if new:
            self.peak = max(self.peak, self.now())
        return result
