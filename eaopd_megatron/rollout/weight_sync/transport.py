"""The interface of all transports, and what those that send bucket by bucket have in common."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from eaopd_megatron.checkpoint.hf_export import NamedTensors
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.weight_sync.session import UpdateSession
from eaopd_megatron.serving.http import Busy, ServerGone, SGLangClient

GATHERED_COPIES = 3
"""Of a parameter while its Hugging Face tensors are made: its shards, the shards joined, the tensors."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """data: uint8 [bytes], the placed tensors one after the other without gaps."""

    data: torch.Tensor
    specs: Sequence[TensorSpec] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the data, by name."""
        start = 0
        for one in self.specs:
            yield one.name, self.data[start : start + one.nbytes].view(one.dtype).view(one.shape)
            start += one.nbytes


def bucket_capacity(bucket_bytes: int, parameter_bytes: Iterable[int]) -> int:
    """Bytes of a bucket such that two of them, and what gathering a parameter takes, fit into 2 · bucket_bytes.

    parameter_bytes: of each of the model's parameters. Those above a third of a bucket are left out of the account:
    they take their own size beside the buckets.
    """
    most = max((size for size in parameter_bytes if GATHERED_COPIES * size <= bucket_bytes), default=0)
    return bucket_bytes - GATHERED_COPIES * most // 2


def pack_buckets(tensors: Iterable[tuple[str, torch.Tensor]], capacity: int) -> Iterator[Bucket]:
    """The tensors in their order, in buckets of up to `capacity` bytes on the tensors' device.

    When a bucket is asked for, the one before the last is written again. A tensor that is greater than a bucket is one
    of its own, in the memory in which it came. A receiver puts the tensors side by side, so one whose dtype does not
    fit the bytes before it begins a bucket.
    """
    buffers: list[torch.Tensor] = []
    turn, used = 0, 0
    placed: list[TensorSpec] = []
    for name, tensor in tensors:
        one = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        if placed and (used + one.nbytes > capacity or used % one.dtype.itemsize):
            yield Bucket(buffers[turn][:used], placed)
            turn, used, placed = 1 - turn, 0, []
        if one.nbytes > capacity:
            yield Bucket(tensor.contiguous().view(-1).view(torch.uint8), [one])
            continue
        if len(buffers) <= turn:
            buffers.append(torch.empty(capacity, dtype=torch.uint8, device=tensor.device))
        buffers[turn][used : used + one.nbytes].view(one.dtype).view(one.shape).copy_(tensor)
        placed.append(one)
        used += one.nbytes
    if placed:
        yield Bucket(buffers[turn][:used], placed)


T = TypeVar("T")
Sent = TypeVar("Sent")
ServerCall = Callable[[SGLangClient], Coroutine[Any, Any, Any]]
"""What is asked of a server."""
PendingCalls = Mapping[SGLangClient, "asyncio.Task[Any]"]


class RunCoroutine(Protocol):
    """Runs a coroutine in the event loop of the clients, which is another thread's."""

    def __call__(self, work: Coroutine[Any, Any, T]) -> T: ...


class WeightUpdate:
    """The servers of one update: `left` are still in it, the others `failed`, each for a reason of one line."""

    def __init__(self, run: RunCoroutine, clients: Iterable[SGLangClient]) -> None:
        self._run, self.active = run, list(clients)
        self.failed: dict[SGLangClient, str] = {}

    def start(self, call: ServerCall, clients: Iterable[SGLangClient] | None = None) -> PendingCalls:
        """Begin a call of every server that is left, or of some."""
        called = list(self.active if clients is None else clients)

        async def begin() -> dict[SGLangClient, asyncio.Task[Any]]:
            return {client: asyncio.create_task(call(client)) for client in called}

        return self._run(begin()) if called else {}

    def finish(self, calls: PendingCalls) -> dict[SGLangClient, Any]:
        """The answers. A server whose call failed leaves the update."""

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
        """`start` and `finish`."""
        return self.finish(self.start(call))

    def fail(self, client: SGLangClient, reason: str) -> None:
        """The server leaves the update; its first reason counts."""
        if client in self.active:
            self.active.remove(client)
            self.failed[client] = reason


class Transport(ABC):
    """A way to the servers, used by one thread of the main rank."""

    @abstractmethod
    def send(self, tensors: NamedTensors, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Give all servers the tensors as `version`. Returns those that have not got them, each with a reason.

        The tensors may not be run to their end.
        """

    def forget(self, client: SGLangClient) -> None:  # noqa: B027 (most keep nothing)
        """The server is dead, or another one has taken its place: what is kept for it is given up."""

    def close(self) -> None:  # noqa: B027
        """No update will follow."""


class BucketTransport(Transport, Generic[Sent]):
    """One bucket after the other: while one is on its way the next is filled."""

    def __init__(self, run: RunCoroutine, seconds: float, capacity: int) -> None:
        """seconds: limit on a bucket's way. capacity: bytes of a bucket."""
        self._run, self._session, self._capacity = run, UpdateSession(seconds), capacity

    @abstractmethod
    def connect(self, push: WeightUpdate, ranks: Mapping[SGLangClient, int]) -> None:
        """Whatever the servers, each of so many ranks, need before the first bucket."""

    @abstractmethod
    def start(self, push: WeightUpdate, bucket: Bucket) -> Sent:
        """Begin to send a bucket to the servers that are left."""

    @abstractmethod
    def finish(self, push: WeightUpdate, sent: Sent) -> None:
        """Returns when the bucket's memory is free again: each server has it or has left the update."""

    def send(self, tensors: NamedTensors, version: str, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        push = WeightUpdate(self._run, clients)
        push.call_all(self._session.begin_update)
        self.connect(push, push.call_all(self._session.tp_size))
        sent: Sent | None = None
        for bucket in pack_buckets(tensors, self._capacity):
            if sent is not None:
                self.finish(push, sent)
            if not push.active:
                return push.failed
            sent = self.start(push, bucket)
        if sent is not None:
            self.finish(push, sent)
        push.call_all(lambda client: self._session.end_update(client, version))
        return push.failed
