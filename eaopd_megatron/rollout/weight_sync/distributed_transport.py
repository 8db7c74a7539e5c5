"""Weights by broadcast in process groups of the main rank and a server's ranks: gloo on CPUs, NCCL on GPUs.

Each server has a group of its own, so that one that dies during an update does not stop the others: if all were in one
group, their watchdogs would end the servers whose broadcast is broken off. So the main rank's GPU has as many NCCL
communicators as there are servers.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
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
from eaopd_megatron.utils.gpu_environment import nccl_difference
from eaopd_megatron.utils.lifetime import call_in_thread, complete
from eaopd_megatron.utils.ports import listening_store

ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def join_process_group(
    store: dist.Store, name: str, rank: int, world_size: int, backend: str, seconds: float
) -> dist.ProcessGroup:
    """Join a group beside the default one, together with ranks of another program. Blocks until all have joined.

    Raises RuntimeError if they have not within `seconds`, which also limits every operation of the group. torch has no
    public call for this; SGLang's side uses the same private ones.
    """
    from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper, _world

    with _keep_process_alive(backend):
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
def _keep_process_alive(backend: str) -> Iterator[None]:
    """Create NCCL groups whose watchdog does not end the process when a server dies or the group is aborted."""
    before = os.environ.get(ERROR_HANDLING)
    if backend == "nccl":
        os.environ[ERROR_HANDLING] = "0"  # read when a group is created
    try:
        yield
    finally:
        os.environ.pop(ERROR_HANDLING, None)
        if before is not None:
            os.environ[ERROR_HANDLING] = before


def abort_process_group(group: dist.ProcessGroup) -> None:
    """Leave a group without waiting for its other ranks, which may be dead or hang."""
    from torch.distributed.distributed_c10d import _abort_process_group

    with suppress(RuntimeError, ValueError):
        _abort_process_group(group)


class UpdateGroup:
    """Rank 0 of a server's group, and the TCP store through which the server's ranks join."""

    def __init__(self, name: str, ranks: int, address: str, *, seconds: float) -> None:
        """ranks: of the server. address: of this host, as seen by the server. seconds: limit of one operation.

        Raises UserError if the address is not one of this host's.
        """
        self.name, self.world_size, self.address = name, 1 + ranks, address
        self._seconds = seconds
        try:
            self._store = listening_store(address, seconds=seconds)
        except OSError:
            raise UserError(
                f"weight_sync.address: {address} is no address of this host; give the one that the servers reach it by"
            ) from None
        self._keys = self._store.num_keys()
        self._group: dist.ProcessGroup | None = None
        self._connected = False  # by a first broadcast

    @property
    def port(self) -> int:
        """Port of the store."""
        return self._store.port

    def arrived(self) -> bool:
        """Return whether a rank of the server has connected to the store."""
        return self._store.num_keys() > self._keys

    def join(self, backend: str) -> None:
        """Block until all ranks have joined. Raises RuntimeError."""
        self._group = join_process_group(self._store, self.name, 0, self.world_size, backend, self._seconds)

    def broadcast(self, data: torch.Tensor) -> dist.Work:
        """Start a broadcast to the server's ranks. Raises RuntimeError if a connection is lost."""
        work = dist.broadcast(data, group_src=0, group=self._group, async_op=True)
        assert work is not None
        return work

    def start_broadcasts(self, parts: Sequence[torch.Tensor]) -> Future[list[dist.Work]]:
        """Start broadcasts, the first time in a thread: NCCL connects in it, without a limit of time.

        The future has a RuntimeError if a connection is lost.
        """
        if self._connected:
            return complete(Future(), lambda: [self.broadcast(data) for data in parts])

        def connect() -> list[dist.Work]:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                works = [self.broadcast(data) for data in parts]
            self._connected = True
            return works

        stream = torch.cuda.current_stream(parts[0].device) if parts[0].is_cuda else None
        return call_in_thread(connect, f"connecting {self.name}")

    def leave(self) -> None:
        """End this rank's part without waiting for the others."""
        if self._group is None:
            return
        references, self._group = [self._group], None
        left = call_in_thread(lambda: abort_process_group(references[0]), f"leaving {self.name}")
        with suppress(TimeoutError):  # of a group that is still connecting
            left.result(_LEAVE_SECONDS)
        # gloo's destructor waits for the last operation, if a rank hangs until the time limit
        call_in_thread(references.clear, f"freeing {self.name}")


def local_address_towards(url: str) -> str:
    """Return the address of this host from which it reaches a server."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "", parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])


LARGE_TENSOR_BYTES = 2**20
"""Average tensor size of a bucket from which tensors are broadcast one by one: for a flattened bucket SGLang allocates
as much memory again, which then costs more than separate broadcasts."""
_POLL_SECONDS = 0.005
"""Interval at which the store is checked for a server's arrival."""
_LEAVE_SECONDS = 3.0
"""Time a server, or this rank, has to leave a group."""
_ANSWER_SECONDS = 0.1


@dataclass(frozen=True)
class PendingBroadcast:
    """A bucket being sent: the requests to the servers and the broadcasts on their groups."""

    calls: PendingCalls
    works: dict[SGLangClient, list[dist.Work]]
    bucket: Bucket


class DistributedTransport(BucketTransport[PendingBroadcast]):
    """Broadcasts buckets. address: of this host, as seen by the servers; None: the route's own."""

    def __init__(
        self, run: RunCoroutine, seconds: float, capacity: int, *, backend: str, address: str | None = None
    ) -> None:
        super().__init__(run, seconds, capacity)
        self._seconds, self._backend, self._address = seconds, backend, address
        self._groups: dict[SGLangClient, UpdateGroup] = {}
        # unique: a server refuses the name of a group it knows, even of an earlier run
        self._names = (f"weights-{uuid.uuid4().hex[:8]}-{generation}" for generation in itertools.count(1))

    def connect(self, update: WeightUpdate, ranks: Mapping[SGLangClient, int]) -> None:
        """Create and join a group for every server that has none."""
        made = {client: self._group(client, count) for client, count in ranks.items() if client not in self._groups}
        calls = update.start(lambda client: self._invite(client, made[client]), made)
        deadline = time.monotonic() + self._seconds + 1  # the requests' own limit comes first
        for client, group in made.items():
            with self._drop_on_error(update, client):
                if not self._wait_until(group.arrived, calls[client].done, deadline):
                    continue  # the request's error tells why
                self._groups[client] = group
                group.join(self._backend)
        update.finish(calls)
        self._drop_failed(update)

    def start(self, update: WeightUpdate, bucket: Bucket) -> PendingBroadcast:
        body: dict[str, Any] = {
            "names": [spec.name for spec in bucket.specs],
            "dtypes": [str(spec.dtype).removeprefix("torch.") for spec in bucket.specs],
            "shapes": [list(spec.shape) for spec in bucket.specs],
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

        sent = PendingBroadcast(update.start(announce), {}, bucket)
        begun = {client: groups[client].start_broadcasts(parts) for client in update.active}
        deadline = time.monotonic() + self._seconds + 1  # the requests' own limit comes first
        for client, works in begun.items():
            with self._drop_on_error(update, client):
                if self._wait_until(works.done, sent.calls[client].done, deadline):
                    sent.works[client] = works.result()
        return sent

    def finish(self, update: WeightUpdate, sent: PendingBroadcast) -> None:
        update.finish(sent.calls)
        for client in list(update.active):  # the server has received everything: returns at once
            with self._drop_on_error(update, client):
                for work in sent.works.get(client, ()):
                    work.wait(timedelta(seconds=self._seconds))
        self._drop_failed(update)

    def forget(self, client: SGLangClient) -> None:
        if client in self._groups:
            self._groups.pop(client).leave()

    def close(self) -> None:
        names = {client: {"group_name": group.name} for client, group in self._groups.items()}
        path = "/destroy_weights_update_group"
        WeightUpdate(self._run, names).call_all(
            lambda client: client.request("POST", path, names[client], seconds=_LEAVE_SECONDS, attempts=1)
        )
        for client in names:
            self.forget(client)

    def _group(self, client: SGLangClient, ranks: int) -> UpdateGroup:
        address = self._address or local_address_towards(client.url)
        return UpdateGroup(next(self._names), ranks, address, seconds=self._seconds)

    async def _invite(self, client: SGLangClient, group: UpdateGroup) -> Any:
        if self._backend == "nccl" and (difference := nccl_difference(client.url, await client.server_info())):
            raise UserError(difference)
        body = {
            "master_address": group.address,
            "master_port": group.port,
            "rank_offset": 1,
            "world_size": group.world_size,
            "group_name": group.name,
            "backend": self._backend,
        }
        return await self._session.post(client, "/init_weights_update_group", body)

    def _wait_until(self, reached: Callable[[], bool], answered: Callable[[], bool], deadline: float) -> bool:
        """Return whether it is reached, rather than answered by the server with an error. Raises RuntimeError."""
        while not reached():
            if answered():
                time.sleep(_ANSWER_SECONDS)  # a server may answer at the moment in which it is reached
                return reached()
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server did not come within {self._seconds:g} s")
            time.sleep(_POLL_SECONDS)
        return True

    @contextmanager
    def _drop_on_error(self, update: WeightUpdate, client: SGLangClient) -> Iterator[None]:
        """Remove a server from the update if its group raises an error."""
        try:
            yield
        except RuntimeError as error:
            update.fail(client, f"its update group broke off: {' '.join(str(error).split())[:200]}")
            self.forget(client)

    def _drop_failed(self, update: WeightUpdate) -> None:
        """Leave the groups of failed servers, which also frees servers that wait in them."""
        for client in update.failed:
            self.forget(client)
