"""Buckets, groups and sessions of weight updates, each by itself."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import inspect
import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.multiprocessing import reductions

from eaopd_megatron.checkpoint.safetensors_io import PlannedTensor
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.weight_sync import distributed_transport
from eaopd_megatron.rollout.weight_sync import local_transports as in_request
from eaopd_megatron.rollout.weight_sync.distributed_transport import (
    ERROR_HANDLING,
    DistributedTransport,
    UpdateGroup,
    local_address_towards,
)
from eaopd_megatron.rollout.weight_sync.session import UpdateSession
from eaopd_megatron.rollout.weight_sync.transport import (
    GATHERED_COPIES,
    Bucket,
    BucketTransport,
    WeightUpdate,
    bucket_capacity,
    pack_buckets,
)
from eaopd_megatron.serving.http import Busy, SGLangClient
from tools.sglang_double.processes import in_a_loop
from tools.sglang_double.server import Double

SESSION = UpdateSession(seconds=5.0)


def some(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    """Tensors of so many numbers, each number another."""
    return [(f"{dtype}{i}", (torch.arange(size) + 100 * i).to(dtype).reshape(1, size)) for i, size in enumerate(sizes)]


def test_a_bucket_is_written_while_it_is_sent() -> None:
    """One is still on its way when the next is filled; the third takes the memory of the first."""
    given = some(3, 2, 4, 1, 1, 5)
    taken: dict[str, torch.Tensor] = {}
    memory = set()
    before: tuple[Bucket, dict[str, torch.Tensor]] | None = None
    for bucket in pack_buckets(iter(given), 20):
        assert bucket.data.nbytes <= 20 and bucket.data.dtype == torch.uint8
        memory.add(bucket.data.data_ptr())
        if before is not None:
            assert all(torch.equal(view, before[1][name]) for name, view in before[0].tensors())
        before = bucket, {name: view.clone() for name, view in bucket.tensors()}
        taken |= before[1]
    assert list(taken) == [name for name, _ in given], "the order"
    assert all(torch.equal(taken[name], tensor) for name, tensor in given)
    assert len(memory) == 2, "more than two buckets were held"


def test_a_tensor_greater_than_a_bucket_is_cut_or_copied() -> None:
    given = some(2, 9, 3)
    found = list(pack_buckets(iter(given), 20))
    assert [[one.name for one in bucket.specs] for bucket in found] == [[name] for name, _ in given]
    assert found[1].data.data_ptr() == given[1][1].data_ptr()
    assert found[1].specs == [PlannedTensor(given[1][0], (1, 9), torch.float32)]


def test_a_tensor_does_not_lie_where_its_dtype_can_be_read() -> None:
    """A server reads a tensor where the one before it ends."""
    given = [*some(3, dtype=torch.bfloat16), *some(2), *some(1, 1, dtype=torch.bfloat16)[1:]]
    found = list(pack_buckets(iter(given), 100))
    assert [len(bucket.specs) for bucket in found] == [1, 2]
    taken = {name: view for bucket in found for name, view in bucket.tensors()}
    assert all(torch.equal(taken[name], tensor) for name, tensor in given)


def test_gathering_is_left_out_of_the_memory_of_two_buckets() -> None:
    room = bucket_capacity(1000, [10, 100, 5000])
    assert 2 * room + GATHERED_COPIES * 100 == 2000
    assert bucket_capacity(1000, [5000]) == 1000


def test_torch_has_moved_what_update_groups_are_made_of() -> None:
    """Private: `_new_process_group_helper`, `_world.pg_group_ranks`, `_abort_process_group`."""
    for _ in range(2):  # a name is free again when its group was left
        group = UpdateGroup("weights", 0, "127.0.0.1", seconds=5.0)
        group.join("gloo")
        data = torch.ones(4)
        group.broadcast(data).wait()
        assert torch.equal(data, torch.ones(4)) and not dist.is_initialized()
        group.leave()


@pytest.mark.parametrize("before", [None, "3"])
@pytest.mark.parametrize(("backend", "inside"), [("nccl", "0"), ("gloo", None)])
def test_a_server_that_dies_in_an_nccl_update_ends_the_trainer(
    monkeypatch: pytest.MonkeyPatch, backend: str, inside: str | None, before: str | None
) -> None:
    """Its group is told to leave errors to us, and no other group is. NCCL itself is not run."""
    seen: list[str | None] = []

    def made(*_: object, **__: object) -> None:
        seen.append(os.environ.get(ERROR_HANDLING))
        raise RuntimeError("no GPU")

    monkeypatch.delenv(ERROR_HANDLING, raising=False)
    if before is not None:
        monkeypatch.setenv(ERROR_HANDLING, before)
    monkeypatch.setattr(distributed_c10d, "_new_process_group_helper", made)
    with pytest.raises(RuntimeError, match="no GPU"):
        UpdateGroup("weights", 1, "127.0.0.1", seconds=0.3).join(backend)
    assert seen == [inside or before] and os.environ.get(ERROR_HANDLING) == before


def test_a_server_that_never_comes_is_waited_for_without_end() -> None:
    group = UpdateGroup("weights", 1, "127.0.0.1", seconds=0.2)
    assert not group.arrived()
    with pytest.raises(RuntimeError):
        group.join("gloo")


class NeverThere(UpdateGroup):
    """A group whose first collective does not return, as NCCL's while a rank is missing."""

    def broadcast(self, data: torch.Tensor) -> dist.Work:
        threading.Event().wait()
        raise AssertionError

    def join(self, backend: str) -> None:
        self._group = object()  # type: ignore[assignment]


@contextmanager
def a_transport(monkeypatch: pytest.MonkeyPatch, answers: Any) -> Iterator[DistributedTransport]:
    """A transport with one server that has joined. answers: to a bucket, or an error; None: never any."""
    monkeypatch.setattr(distributed_transport, "UpdateGroup", NeverThere)
    monkeypatch.setattr(distributed_transport, "_LEAVE_SECONDS", 0.1)

    async def post(self: UpdateSession, client: SGLangClient, path: str, body: Any) -> Any:
        if answers is None:
            await asyncio.Event().wait()
        if isinstance(answers, Exception):
            raise answers
        return answers

    monkeypatch.setattr(UpdateSession, "post", post)
    with in_a_loop() as run:
        transport = DistributedTransport(run, 5.0, 100, backend="gloo", address="127.0.0.1")
        yield transport


def first_bucket(transport: DistributedTransport, client: SGLangClient, seconds: float) -> dict[SGLangClient, str]:
    update = WeightUpdate(transport._run, [client])
    group = transport._group(client, 1)
    group.join("gloo")
    transport._groups[client] = group
    transport._seconds = seconds
    sent = transport.start(update, Bucket(torch.zeros(4, dtype=torch.uint8), [PlannedTensor("a", (4,), torch.uint8)]))
    if update.active:
        transport.finish(update, sent)
    else:
        for call in sent.calls.values():
            call.get_loop().call_soon_threadsafe(call.cancel)
    return update.failed


def test_the_first_broadcast_of_a_group_waits_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's own part is a stand-in."""
    client = SGLangClient("http://a:1")
    with a_transport(monkeypatch, None) as transport:
        failed = first_bucket(transport, client, -0.7)
        assert failed == {client: "its update group broke off: the server did not come within -0.7 s"}
        assert client not in transport._groups


def test_a_server_that_refuses_the_first_bucket_is_waited_for_in_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    client = SGLangClient("http://a:1")
    with a_transport(monkeypatch, UserError("it refuses")) as transport:
        started = time.monotonic()
        assert first_bucket(transport, client, 60.0) == {client: "it refuses"}
        assert time.monotonic() - started < 20
        assert client not in transport._groups


def test_servers_with_other_nccl_options_are_sent_weights_by_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)

    async def work(double: Double, client: SGLangClient) -> None:
        info = double._server_info()
        double._server_info = lambda: {**info, "enable_nccl_nvls": True}  # type: ignore[method-assign]
        transport = DistributedTransport(lambda work: work, 5.0, 100, backend="nccl")  # type: ignore[arg-type,return-value]
        with pytest.raises(UserError, match=r"with NCCL_NVLS_ENABLE=1 .* the trainer with NCCL_NVLS_ENABLE=0"):
            await transport._invite(client, UpdateGroup("other-options", 1, "127.0.0.1", seconds=1.0))

    with a_server() as served:
        served(work)


class LateReader(BucketTransport[int]):
    """A server that reads a bucket before it answers the next request, as it does over CUDA IPC at the latest."""

    def __init__(self, capacity: int, *, reads_late: bool) -> None:
        async def nothing(*_: Any) -> None: ...

        super().__init__(lambda work: work.close(), 1.0, capacity, reads_late=reads_late)  # type: ignore[arg-type,return-value]
        self.unread: list[Bucket] = []
        self.taken: dict[str, torch.Tensor] = {}
        self.alive: list[weakref.ref[Any]] = []
        self.most = 0

    def connect(self, update: WeightUpdate, ranks: Mapping[SGLangClient, int]) -> None: ...

    def read(self, count: int) -> None:
        for bucket in self.unread[:count]:
            self.taken |= {name: view.clone() for name, view in bucket.tensors()}
        del self.unread[:count]

    def start(self, update: WeightUpdate, bucket: Bucket) -> int:
        alias = torch.frombuffer(
            (ctypes.c_char * len(bucket.data)).from_address(bucket.data.data_ptr()), dtype=torch.uint8
        )
        self.unread.append(Bucket(alias, bucket.specs))  # does not keep the memory, as a handle does not
        self.alive.append(weakref.ref(bucket.data.untyped_storage()))
        self.most = max(self.most, sum(one() is not None for one in self.alive))
        return len(self.alive)

    def finish(self, update: WeightUpdate, sent: int) -> None:
        self.read(len(self.unread) - 1)


def late(monkeypatch: pytest.MonkeyPatch, given: list[tuple[str, torch.Tensor]], *, reads_late: bool) -> LateReader:
    reader = LateReader(20, reads_late=reads_late)

    def read_all(self: WeightUpdate, call: object) -> dict[object, object]:
        reader.read(len(reader.unread))
        return {}

    monkeypatch.setattr(WeightUpdate, "call_all", read_all)
    reader.send(iter(given), "1", [SGLangClient("http://a:1")])
    return reader


def test_a_bucket_is_refilled_while_a_server_still_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA IPC is a stand-in: memory that the reader looks at late. With two reused buckets it reads others' bytes."""
    given = some(3, 2, 4, 1, 1, 5, 9, 4, 2, 2)
    reader = late(monkeypatch, given, reads_late=True)
    assert all(torch.equal(reader.taken[name], tensor) for name, tensor in given)
    assert reader.most <= 3, "more than three buckets were held"
    reused = late(monkeypatch, given, reads_late=False)
    assert not all(torch.equal(reused.taken[name], tensor) for name, tensor in given), "this test shows nothing"


def test_a_parameter_itself_is_lent_to_a_server() -> None:
    """torch would count its handles, one update after the other, as long as the parameter lives."""
    given = some(2, 9, 3)
    found = list(pack_buckets(iter(given), 20, own_memory=True))
    assert len({bucket.data.untyped_storage().data_ptr() for bucket in found}) == 3
    assert found[1].data.data_ptr() != given[1][1].data_ptr()
    assert torch.equal(dict(found[1].tensors())[given[1][0]], given[1][1])


def test_a_server_is_told_an_address_that_it_cannot_reach() -> None:
    assert local_address_towards("http://127.0.0.1:30000") == "127.0.0.1"


def test_an_address_of_another_host_is_a_traceback() -> None:
    with pytest.raises(UserError, match=r"weight_sync\.address: no\.such\.invalid is no address of this host"):
        UpdateGroup("weights", 1, "no.such.invalid", seconds=0.3)


def test_each_tensor_of_a_request_brings_its_bucket_along() -> None:
    (bucket,) = pack_buckets(iter(some(1000, 1000, 1000)), 12_000)
    text = in_request.serialize_bucket(bucket)
    assert len(text) < 1.4 * 12_000 + 3000
    found = dict(pickle.loads(base64.b64decode(text)))
    assert all(torch.equal(found[name], tensor) for name, tensor in some(1000, 1000, 1000))


def test_torch_has_moved_the_device_of_a_cuda_tensor() -> None:
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[in_request.DEVICE_INDEX] == "storage_device"


Work = Callable[[Double, SGLangClient], Coroutine[Any, Any, Any]]


@contextmanager
def a_server() -> Iterator[Callable[[Work], Any]]:
    """Work with a double and its client."""
    with in_a_loop() as run:

        async def one(work: Work) -> Any:
            async with Double() as double:
                client = SGLangClient(double.url)
                try:
                    return await work(double, client)
                finally:
                    await client.close()

        yield lambda work: run(one(work))


def test_an_update_that_broke_off_blocks_the_next() -> None:
    async def work(double: Double, client: SGLangClient) -> None:
        for version in ("1", "2"):
            await SESSION.begin_update(client)
            assert double.paused and double.session
            await SESSION.begin_update(client)  # the other one broke off
            await SESSION.end_update(client, version)
            assert (double.weight_version, double.paused, double.session) == (version, False, False)

    with a_server() as served:
        served(work)


def test_another_version_than_was_sent_passes() -> None:
    async def work(double: Double, client: SGLangClient) -> None:
        double._post_update_weight_version = lambda body: {}  # type: ignore[method-assign]
        await SESSION.begin_update(client)
        with pytest.raises(UserError, match="it has weights '0' after an update to '5'"):
            await SESSION.end_update(client, "5")

    with a_server() as served:
        served(work)


def test_a_bucket_is_sent_twice_to_a_busy_server() -> None:
    async def work(double: Double, client: SGLangClient) -> None:
        said: list[str] = []

        def fail(body: dict[str, Any]) -> None:
            said.append("once")
            raise RuntimeError

        double._post_begin_weight_update = fail  # type: ignore[method-assign, assignment]
        with pytest.raises(Busy):
            await SESSION.begin_update(client)
        assert said == ["once"]

    with a_server() as served:
        served(work)


def test_a_server_of_data_parallel_ranks_is_sent_tensors() -> None:
    async def work(double: Double, client: SGLangClient) -> None:
        assert await SESSION.tp_size(client) == 1
        info = double._server_info()
        double._server_info = lambda: {**info, "dp_size": 2}  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"has dp_size 2, which takes weight_sync\.transport=disk"):
            await SESSION.tp_size(client)

    with a_server() as served:
        served(work)
