"""Weights by broadcast: the main rank and the ranks of a server are a process group, gloo on CPUs and NCCL on GPUs.

Each server has a group of its own, so that one that dies in the middle of an update stops nobody else. NCCL has not
been run.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.weight_sync.transport import (
    Bucket,
    BucketTransport,
    PendingCalls,
    RunCoroutine,
    WeightUpdate,
)
from eaopd_megatron.serving.http import SGLangClient

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def join_process_group(
    store: dist.Store, name: str, rank: int, world_size: int, backend: str, seconds: float
) -> dist.ProcessGroup:
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


def abort_process_group(group: dist.ProcessGroup) -> None:
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
        self._group = join_process_group(self._store, self.name, 0, self.world_size, backend, self._seconds)

    def broadcast(self, data: torch.Tensor) -> dist.Work:
        """Begin to send it to the server's ranks. Raises RuntimeError where a connection is known to be lost."""
        work = dist.broadcast(data, group_src=0, group=self._group, async_op=True)
        assert work is not None
        return work

    def leave(self) -> None:
        """End this rank's part, whatever became of the others."""
        if self._group is None:
            return
        abort_process_group(self._group)
        # Gloo ends a group when its last operation does, which with a rank that hangs is at the time limit.
        held, self._group = [self._group], None
        threading.Thread(target=held.clear, name=f"leaving {self.name}", daemon=True).start()


def local_address_towards(url: str) -> str:
    """The address of this host from which it reaches a server."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "", parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])


LARGE_TENSOR_BYTES = 2**20
"""Bytes of a tensor, on average over a bucket, from which on each is broadcast by itself: to take a bucket in one piece
SGLang puts as much new memory together first, which costs more than the broadcast. Small tensors cost more one by one.
"""
ARRIVAL_POLL = 0.005
"""Seconds between two looks for a server at the meeting place."""
FAREWELL_SECONDS = 3.0
"""What a server has to leave its group at the end of a run, which may have been told to end soon."""


@dataclass(frozen=True)
class PendingBroadcast:
    """A bucket on its way: what the servers were told, and what was begun on each group."""

    calls: PendingCalls
    works: dict[SGLangClient, list[dist.Work]]
    bucket: Bucket


class DistributedTransport(BucketTransport[PendingBroadcast]):
    """See the module. address: of this host, as the servers reach it; none: found out."""

    def __init__(
        self, run: RunCoroutine, seconds: float, capacity: int, *, backend: str, address: str | None = None
    ) -> None:
        super().__init__(run, seconds, capacity)
        self._seconds, self._backend, self._address = seconds, backend, address
        self._groups: dict[SGLangClient, UpdateGroup] = {}
        # a server refuses the name of a group that it knows, be it of a run that has ended
        self._names = (f"weights-{uuid.uuid4().hex[:8]}-{generation}" for generation in itertools.count(1))

    def connect(self, push: WeightUpdate, ranks: Mapping[SGLangClient, int]) -> None:
        """A group for every server that has none."""
        made = {client: self._group(client, count) for client, count in ranks.items() if client not in self._groups}
        calls = push.start(lambda client: self._invite(client, made[client]), made)
        for client, group in made.items():
            if not self._await(group, calls[client].done):
                continue  # its call says why
            with self._leaving(push, client):
                self._groups[client] = group
                group.join(self._backend)
        push.finish(calls)
        self._drop_failed(push)

    def start(self, push: WeightUpdate, bucket: Bucket) -> PendingBroadcast:
        body: dict[str, Any] = {
            "names": [one.name for one in bucket.specs],
            "dtypes": [str(one.dtype).removeprefix("torch.") for one in bucket.specs],
            "shapes": [list(one.shape) for one in bucket.specs],
        }
        parts = [bucket.data]
        if len(bucket.data) < LARGE_TENSOR_BYTES * len(bucket.specs):
            body["load_format"] = "flattened_bucket"
        else:
            parts = [tensor for _, tensor in bucket.tensors()]
        groups = self._groups

        async def announce(client: SGLangClient) -> Any:
            named = {**body, "group_name": groups[client].name}
            return await self._session.post(client, "/update_weights_from_distributed", named)

        sent = PendingBroadcast(push.start(announce), {}, bucket)
        for client in list(push.active):
            with self._leaving(push, client):
                sent.works[client] = [groups[client].broadcast(part) for part in parts]
        return sent

    def finish(self, push: WeightUpdate, sent: PendingBroadcast) -> None:
        push.finish(sent.calls)
        for client in list(push.active):  # the server has everything, so this returns at once
            with self._leaving(push, client):
                for work in sent.works[client]:
                    work.wait(timedelta(seconds=self._seconds))
        self._drop_failed(push)

    def forget(self, client: SGLangClient) -> None:
        if client in self._groups:
            self._groups.pop(client).leave()

    def close(self) -> None:
        names = {client: {"group_name": group.name} for client, group in self._groups.items()}
        path = "/destroy_weights_update_group"
        WeightUpdate(self._run, names).call_all(
            lambda client: client.request("POST", path, names[client], seconds=FAREWELL_SECONDS, attempts=1)
        )
        for client in names:
            self.forget(client)

    def _group(self, client: SGLangClient, ranks: int) -> UpdateGroup:
        return UpdateGroup(
            next(self._names), ranks, self._address or local_address_towards(client.url), seconds=self._seconds
        )

    async def _invite(self, client: SGLangClient, group: UpdateGroup) -> Any:
        body = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": 1,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": self._backend,
        }
        return await self._session.post(client, "/init_weights_update_group", body)

    def _await(self, group: UpdateGroup, over: Callable[[], bool]) -> bool:
        """Whether the server has come to the meeting place, and not refused or died before."""
        while not group.arrived():
            if over():
                return False
            time.sleep(ARRIVAL_POLL)
        return True

    @contextmanager
    def _leaving(self, push: WeightUpdate, client: SGLangClient) -> Iterator[None]:
        """A server whose group has an error inside leaves the update."""
        try:
            yield
        except RuntimeError as error:
            push.fail(client, f"its update group broke off: {' '.join(str(error).split())[:200]}")
            self.forget(client)

    def _drop_failed(self, push: WeightUpdate) -> None:
        """A group in which an operation failed is of no use any more; leaving it frees a server that waits in it."""
        for client in push.failed:
            self.forget(client)
