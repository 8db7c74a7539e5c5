"""The process group of the trainer's main rank and the ranks of one server."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from eaopd_megatron.errors import UserError

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def join(store: dist.Store, name: str, rank: int, world_size: int, backend: str, seconds: float) -> dist.ProcessGroup:
    """Join a group beside the default one, which the ranks of other programs join as well. Returns when all have.

    What torch has for this is private; SGLang's side of it does the same. Raises RuntimeError (torch's DistError among
    them) when not all ranks have come within `seconds`, the limit on every operation of the group as well.
    """
    from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper, _world

    with _errors_left_to_us(backend):
        group, _ = _new_process_group_helper(
            world_size,
            rank,
            [],
            dist.Backend(backend),
            dist.PrefixStore(name, store),
            group_name=GroupName(name),
            timeout=timedelta(seconds=seconds),
        )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


@contextmanager
def _errors_left_to_us(backend: str) -> Iterator[None]:
    """An NCCL group that is made in here has a watchdog that does not end the process.

    By default it does when a server dies in the middle of an update, or when the group is aborted, for which torch asks
    for this. The trainer's own groups keep their watchdogs. NCCL has not been run.
    """
    if backend != "nccl":
        yield
        return
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = "0"  # a group reads it once, when it is made
    try:
        yield
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before


def abort(group: dist.ProcessGroup) -> None:
    """Leave a group in which another rank may be dead, or hang, without waiting for it."""
    from torch.distributed.distributed_c10d import _abort_process_group

    with suppress(RuntimeError, ValueError):
        _abort_process_group(group)


class UpdateGroup:
    """Rank 0 of a group, and the meeting place for the others."""

    def __init__(self, name: str, ranks: int, address: str, *, seconds: float) -> None:
        """ranks: of the server. address: of this host, as the server reaches it. seconds: for any one operation.

        Raises UserError for an address that is not this host's.
        """
        self.name, self.world_size, self.address = name, 1 + ranks, address
        self._seconds = seconds
        try:
            self._store = dist.TCPStore(
                address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=seconds)
            )
        except RuntimeError:
            raise UserError(
                f"weight_sync.address: {address} is no address of this host; give the one that the servers reach it by"
            ) from None
        self._keys = self._store.num_keys()
        self._group: dist.ProcessGroup | None = None

    @property
    def port(self) -> int:
        """Of the meeting place."""
        return self._store.port

    def arrived(self) -> bool:
        """Whether a rank of the server has come to the meeting place."""
        return self._store.num_keys() > self._keys

    def join(self, backend: str) -> None:
        """Returns when all ranks have. Raises RuntimeError."""
        self._group = join(self._store, self.name, 0, self.world_size, backend, self._seconds)

    def broadcast(self, data: torch.Tensor) -> dist.Work:
        """Begin to send it to the server's ranks. Raises RuntimeError where a connection is known to be lost."""
        work = dist.broadcast(data, group_src=0, group=self._group, async_op=True)
        assert work is not None
        return work

    def leave(self) -> None:
        """End this rank's part, whatever became of the others."""
        if self._group is None:
            return
        abort(self._group)
        # Gloo ends a group when its last operation does, which with a rank that hangs is at the time limit.
        held, self._group = [self._group], None
        threading.Thread(target=held.clear, name=f"leaving {self.name}", daemon=True).start()


def own_address(url: str) -> str:
    """The address of this host from which it reaches a server."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "", parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])
