"""Count the bytes of live tensors, exactly and on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of live storages that were created inside the context: `now()` and their `peak`.

    Existing storages do not count, and neither does memory that an operator allocates and frees internally.
    """

    def __init__(self, *existing: torch.Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in existing}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        """Return the bytes that are live now."""
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
