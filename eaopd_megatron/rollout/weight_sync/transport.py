"""The interface of weight transports, and what those that send buckets have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from eaopd_megatron.checkpoint.hf_export import NamedTensors
from eaopd_megatron.checkpoint.safetensors_io import PlannedTensor
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.weight_sync.session import UpdateSession
from eaopd_megatron.serving.http import Busy, ServerGone, SGLangClient

GATHERED_COPIES = 3
"""Copies of a parameter while it is converted to Hugging Face tensors: shards, concatenated shards, result."""


@dataclass(frozen=True)
class Bucket:
    """data: uint8 [bytes], the tensors of `specs` one after the other without gaps."""

    data: torch.Tensor
    specs: Sequence[PlannedTensor] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield views of the data by name."""
        start = 0
        for one in self.specs:
            yield one.name, self.data[start : start + one.nbytes].view(one.dtype).view(one.shape)
            start += one.nbytes


def bucket_capacity(bucket_bytes: int, parameter_bytes: Iterable[int]) -> int:
    """Return the bucket size with which two buckets and one parameter's conversion fit into 2 · bucket_bytes.

    parameter_bytes: sizes of the model's parameters. Those above a third of a bucket are ignored; they need their own
    size in addition.
    """
    largest = max((size for size in parameter_bytes if GATHERED_COPIES * size <= bucket_bytes), default=0)
    return bucket_bytes - GATHERED_COPIES * largest // 2


def pack_buckets(
    tensors: Iterable[tuple[str, torch.Tensor]], capacity: int, *, own_memory: bool = False
) -> Iterator[Bucket]:
    """Yield the tensors in order, in buckets of up to `capacity` bytes on the tensors' device.

    The buffer of a bucket is reused for the next but one. A tensor larger than a bucket becomes its own, without a
    copy. Tensors are packed without gaps, so one whose dtype does not fit the offset starts a new bucket. own_memory:
    nothing is reused or left in place; a bucket's memory is free when the caller drops the bucket.
    """
    buffers: list[torch.Tensor] = []
    turn, used = 0, 0
    specs: list[PlannedTensor] = []
    for name, tensor in tensors:
        spec = PlannedTensor(name, tuple(tensor.shape), tensor.dtype)
        if specs and (used + spec.nbytes > capacity or used % spec.dtype.itemsize):
            yield Bucket(buffers[turn][:used], specs)
            turn, used, specs = 1 - turn, 0, []
        if spec.nbytes > capacity:
            data = tensor.clone() if own_memory else tensor
            yield Bucket(data.contiguous().view(-1).view(torch.uint8), [spec])
            continue
        if own_memory and not specs:
            buffers, turn = [], 0
        if len(buffers) <= turn:
            buffers.append(torch.empty(capacity, dtype=torch.uint8, device=tensor.device))
        buffers[turn][used : used + spec.nbytes].view(spec.dtype).view(spec.shape).copy_(tensor)
        specs.append(spec)
        used += spec.nbytes
    if specs:
        yield Bucket(buffers[turn][:used], specs)


T = TypeVar("T")
Sent = TypeVar("Sent")
ServerCall = Callable[[SGLangClient], Coroutine[Any, Any, Any]]
"""A request to one server."""
PendingCalls = Mapping[SGLangClient, "asyncio.Task[Any]"]


class RunCoroutine(Protocol):
    """Runs a coroutine in the clients' event loop, which belongs to another thread."""

    def __call__(self, work: Coroutine[Any, Any, T]) -> T: ...


class WeightUpdate:
    """The servers of one update: `active` ones, and `failed` ones with a one-line reason each."""

    def __init__(self, run: RunCoroutine, clients: Iterable[SGLangClient]) -> None:
        self._run, self.active = run, list(clients)
        self.failed: dict[SGLangClient, str] = {}

    def start(self, call: ServerCall, clients: Iterable[SGLangClient] | None = None) -> PendingCalls:
        """Start a request to every active server, or to some."""
        called = list(self.active if clients is None else clients)

        async def begin() -> dict[SGLangClient, asyncio.Task[Any]]:
            return {client: asyncio.create_task(call(client)) for client in called}

        return self._run(begin()) if called else {}

    def finish(self, calls: PendingCalls) -> dict[SGLangClient, Any]:
        """Return the answers. Servers whose request failed leave the update."""

        async def wait() -> list[Any]:
            return await asyncio.gather(*calls.values(), return_exceptions=True)

        answers = dict(zip(calls, self._run(wait()), strict=True)) if calls else {}
        for client, answer in answers.items():
            if isinstance(answer, ServerGone | Busy | UserError):
                self.fail(client, str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        return {client: answer for client, answer in answers.items() if client in self.active}

    def call_all(self, call: ServerCall) -> dict[SGLangClient, Any]:
        """Send a request to every active server and return the answers."""
        return self.finish(self.start(call))

    def fail(self, client: SGLangClient, reason: str) -> None:
        """Remove a server from the update; its first reason counts."""
        if client in self.active:
            self.active.remove(client)
            self.failed[client] = reason


class Transport(ABC):
    """A way to send weights to the servers, used by one thread of the main rank."""

    @abstractmethod
    def send(self, tensors: NamedTensors, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Send all tensors as `version` and return the servers that failed, each with a reason.

        May stop early, without exhausting the tensors.
        """

    def forget(self, client: SGLangClient) -> None:  # noqa: B027
        """Release what is kept for a server that died or was replaced."""

    def close(self) -> None:  # noqa: B027
        """Release everything; no update follows."""


class BucketTransport(Transport, Generic[Sent]):
    """Sends bucket after bucket, filling the next one while one is being sent."""

    def __init__(self, run: RunCoroutine, seconds: float, capacity: int, *, reads_late: bool = False) -> None:
        """seconds: time limit per bucket. capacity: bytes of a bucket. reads_late: servers may still read a bucket when
        they have answered, until they answer the next request. Then there are three buckets instead of two."""
        self._run, self._session, self._capacity = run, UpdateSession(seconds), capacity
        self._reads_late = reads_late

    @abstractmethod
    def connect(self, update: WeightUpdate, ranks: Mapping[SGLangClient, int]) -> None:
        """Prepare the servers for the first bucket. ranks: number of ranks of each."""

    @abstractmethod
    def start(self, update: WeightUpdate, bucket: Bucket) -> Sent:
        """Start to send a bucket to the active servers."""

    @abstractmethod
    def finish(self, update: WeightUpdate, sent: Sent) -> None:
        """Block until each server has the bucket (see `reads_late`) or has left the update."""

    def send(self, tensors: NamedTensors, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        update = WeightUpdate(self._run, clients)
        update.call_all(self._session.begin_update)
        self.connect(update, update.call_all(self._session.tp_size))
        sent: Sent | None = None
        # while a bucket is filled, the one before it is being sent, and the one before that may still be read
        held: deque[Bucket] = deque(maxlen=2)
        for bucket in pack_buckets(tensors, self._capacity, own_memory=self._reads_late):
            if sent is not None:
                self.finish(update, sent)
            if not update.active:
                return update.failed
            sent = self.start(update, bucket)
            held.append(bucket)
        if sent is not None:
            self.finish(update, sent)
        update.call_all(lambda client: self._session.end_update(client, version))
        return update.failed
