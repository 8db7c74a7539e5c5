"""Measure what a separate teacher costs a run: bandwidth of its hidden states, bytes per token, and overlap with
generation.

    python tools/benchmark_teacher.py [--rounds N] [--connections N] [--requests N] [--iterations N]

The service is the real HTTP side in its own process, with a scorer whose payloads are ready, or that sleeps; the
client is the trainer's. Every figure is a ratio within this run: bandwidth against a plain TCP stream of the same bytes
over the same loopback, in turns; an iteration of the real training loop against generation and training alone, where
generation, teacher and training sleep 6 : 2 : 2, which shows the schedule and no speed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

warnings.simplefilter("ignore")  # about optional packages

from eaopd_megatron.config.parallel import ParallelLayout  # noqa: E402
from eaopd_megatron.config.schema import TeacherConfig  # noqa: E402
from eaopd_megatron.data.types import Prompt, Sample  # noqa: E402
from eaopd_megatron.distributed.parallel_state import ParallelState  # noqa: E402
from eaopd_megatron.megatron.pipeline import micro_batches_by_teacher  # noqa: E402
from eaopd_megatron.teacher.base import TeacherRouter  # noqa: E402
from eaopd_megatron.teacher.eos_map import TerminalMap  # noqa: E402
from eaopd_megatron.teacher.protocol import TeacherInfo  # noqa: E402
from eaopd_megatron.teacher.remote import RemoteTeacher  # noqa: E402
from eaopd_megatron.teacher.separate import SeparateBackend, SeparateScoreCall, TeacherClient  # noqa: E402
from eaopd_megatron.teacher.service.listener import RequestQueue, TeacherHttpServer  # noqa: E402
from eaopd_megatron.training.loop import train  # noqa: E402

PROMPT, RESPONSE, SAMPLES = 512, 3584, 2  # tokens of a sample, samples of a request
INFO = TeacherInfo("ready rows", "none", "hidden", 0, 4096, "bf16", 151_936, ("none", -1, -1), 10**6, "none")
TERMINAL = TerminalMap("none", -1, -1)
BUDGET = SAMPLES * (PROMPT + RESPONSE)
GENERATION, TEACHER, TRAINING = 6.0, 2.0, 2.0  # seconds of an iteration, each by itself
PARTS, UPDATES = 16, 4


def made(count: int) -> list[Sample]:
    prompt = tuple(range(PROMPT))
    return [Sample(Prompt(str(i), prompt, {}), [7] * RESPONSE, "length", [0.0] * RESPONSE, 0, i) for i in range(count)]


# The other process


def serve(width: int, seconds_a_token: float, places: int) -> None:
    """Serve until stdin ends. Prints the service's URL and the port of a plain stream, which sends as many bytes as the
    8 bytes of a request say."""
    listener, queue = TeacherHttpServer("127.0.0.1:0", None), RequestQueue(places)
    listener.start(queue, TeacherInfo(**{**INFO.to_json(), "terminal": INFO.terminal, "width": width}))
    ready = torch.ones(BUDGET, 2 * width, dtype=torch.uint8)
    threading.Thread(target=score, args=(queue, ready, seconds_a_token), daemon=True).start()
    plain = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=stream, args=(plain, ready.flatten().numpy().data), daemon=True).start()
    print(listener.url, plain.getsockname()[1], flush=True)
    sys.stdin.read()


def score(queue: RequestQueue, ready: torch.Tensor, seconds_a_token: float) -> None:
    while True:
        for request in queue.take(1, 1.0):
            time.sleep(seconds_a_token * request.response_tokens)
            queue.finish([request], [ready[: request.response_tokens]])


def stream(plain: socket.socket, ready: memoryview) -> None:
    while True:
        connection, _ = plain.accept()
        with connection:
            left = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
            while left:
                left -= min(left, len(ready))
                connection.sendall(ready[: min(len(ready), left or len(ready))])


@contextlib.contextmanager
def served(width: int, seconds_a_token: float = 0.0, places: int = 8) -> Iterator[tuple[str, int]]:
    """Yield the URL of a service in its own process, and the port of its plain stream."""
    command = [sys.executable, __file__, "--serve", str(width), str(seconds_a_token), str(places)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url, port = process.stdout.readline().split()
        try:
            yield url, int(port)
        finally:
            process.kill()


# Bandwidth


def streamed(port: int, size: int) -> float:
    """Return the seconds that a plain stream of `size` bytes takes, received into memory like a payload."""
    started = time.perf_counter()
    left = torch.empty(size, dtype=torch.uint8).numpy().data
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(size.to_bytes(8, "little"))
        while left:
            left = left[connection.recv_into(left) :]
    return time.perf_counter() - started


def pulled(url: str, connections: int, calls: Sequence[SeparateScoreCall]) -> float:
    """Return the seconds that the trainer's client takes for the calls."""

    async def work() -> float:
        client = TeacherClient(url, connections=connections)
        slots = asyncio.Semaphore(connections)

        async def one(call: SeparateScoreCall) -> None:
            async with slots:
                payloads.append(await call.attempt(client, 0))

        payloads: list[torch.Tensor] = []
        started = time.perf_counter()
        await asyncio.gather(*map(one, calls))
        seconds = time.perf_counter() - started
        await client.close()
        return seconds

    return asyncio.run(work())


def bandwidth(rounds: int, requests: int, connections: int) -> None:
    """Print GB/s of both ways and the ratio of their medians."""
    source = SeparateBackend(INFO, budget=BUDGET, terminal=TERMINAL, connections=connections)
    rates: dict[str, list[float]] = {"service": [], "stream": []}
    with served(INFO.width) as (url, port):
        for turn in range(rounds + 1):
            calls = [call for call, _ in source.calls(made(requests * SAMPLES), str(turn))]
            size = sum(call.request.response_tokens for call in calls) * INFO.payload_format.bytes_per_token
            ways: dict[str, Callable[[], float]] = {
                "service": partial(pulled, url, connections, calls),
                "stream": partial(streamed, port, size),
            }
            for name in ways if turn % 2 else reversed(ways):
                rates[name].append(size / ways[name]())
    for name, of in rates.items():
        del of[0]  # the first requests are slow
        print(f"{name}: median {statistics.median(of) / 1e9:.2f} GB/s ({' '.join(f'{r / 1e9:.2f}' for r in of)})")
    ratio = statistics.median(rates["service"]) / statistics.median(rates["stream"])
    print(f"service / stream: {ratio:.0%} over {rounds} rounds of {size / 1e9:.2f} GB, {connections} connections")


# Bytes


async def counted(url: str, calls: Sequence[SeparateScoreCall]) -> int:
    """Return the bytes of requests and answers, with all overhead, between the two processes."""
    host, port = url.removeprefix("http://").split(":")
    total = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal total
        while data := await reader.read(2**20):
            total += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_service = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pump(reader, to_service[1]), pump(to_service[0], writer))
        ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_server(between, "127.0.0.1", 0)
    client = TeacherClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections=1)
    for call in calls:
        await call.attempt(client, 0)
    await client.close()
    await ended.wait()
    server.close()
    return total


def traffic(requests: int) -> None:
    """Print bytes per response token, both directions together, against those of its hidden state."""
    source = SeparateBackend(INFO, budget=BUDGET, terminal=TERMINAL, connections=1)
    with served(INFO.width) as (url, _):
        calls = [call for call, _ in source.calls(made(requests * SAMPLES), "t")]
        tokens = sum(call.request.response_tokens for call in calls)
        wire = asyncio.run(counted(url, calls)) / tokens
    own = INFO.payload_format.bytes_per_token
    print(f"bytes a response token: {wire:.1f} on the wire, {own} of hidden state: {wire / own - 1:+.2%}")


# Overlap


class SleepingTrainer:
    """A trainer and its student as `train` and the teacher see them: it sleeps, and uses the teacher's payload."""

    def __init__(self, teachers: TeacherRouter, parallel: ParallelState, iterations: int) -> None:
        self.teachers, self.parallel, self.student = teachers, parallel, self
        self.recipe, self.metrics = self, None
        self.train, self.rollout = self, self
        self.iterations, self.max_staleness, self.importance_clip = iterations, 0, 1.0
        self.iteration = self.updates = 0
        self.updates_per_iteration = UPDATES
        self.seconds: list[float] = []
        self._began = time.perf_counter()

    def update_weights(self) -> None:
        self._began = time.perf_counter()

    def generate(self) -> Iterator[list[Sample]]:
        for part in range(PARTS):
            time.sleep(GENERATION / PARTS)
            yield made(PARTS)[part : part + 1]

    def mini_batches(self, samples: list[Sample]) -> list[list[Sample]]:
        return [samples[update::UPDATES] for update in range(UPDATES)]

    def update(self, samples: list[Sample], teachers: TeacherRouter, **_: Any) -> None:
        batches = micro_batches_by_teacher(samples, BUDGET, self.parallel, teachers.names)
        signal_of = teachers.micro_batch_signals(batches)
        for index, batch in enumerate(batches):
            assert len(cast(Any, signal_of(index)).hidden) == batch.num_response_tokens
        time.sleep(TRAINING / UPDATES)

    def timer(self, phase: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def evaluate_if_due(self) -> None: ...

    def recompute_old_logprobs(self, samples: list[Sample]) -> list[Sample]:
        return samples

    def objective(self, update: int) -> None: ...

    schedule = objective

    def finish_iteration(self, samples: list[Sample]) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.iteration += 1


def overlap(iterations: int) -> None:
    """Print the seconds of an iteration against those of its generation and training."""
    width = 64
    info = TeacherInfo(**{**INFO.to_json(), "terminal": INFO.terminal, "width": width})
    parallel = ParallelState(ParallelLayout(), 0, 1, 0, cast(Any, None), 0, 1, cast(Any, None), torch.device("cpu"))
    with served(width, TEACHER / (PARTS * RESPONSE)) as (url, _):
        teacher = RemoteTeacher(
            parallel,
            SeparateBackend(info, budget=BUDGET, terminal=TERMINAL, connections=8),
            TeacherConfig(model="none", placement="separate", urls=[url]),
            head=torch.zeros(128, width),
            stop_signal=lambda: 0,
            report=print,
        )
        teacher.start(PROMPT + RESPONSE)
        teacher.open()
        trainer = SleepingTrainer(TeacherRouter({"": teacher}), parallel, iterations)
        train(cast(Any, trainer))
        teacher.close()
    alone = GENERATION + TRAINING
    shown = " ".join(f"{seconds:.2f}" for seconds in trainer.seconds)
    print(f"iterations: {shown} s; generation {GENERATION} s + training {TRAINING} s, teacher {TEACHER} s")
    print(f"iteration / (generation + training): {statistics.median(trainer.seconds) / alone:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=8, help="of a round, 59 MB each")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        width, seconds_a_token, places = arguments.serve
        serve(int(width), float(seconds_a_token), int(places))
        return
    bandwidth(arguments.rounds, arguments.requests, arguments.connections)
    traffic(2)
    overlap(arguments.iterations)


if __name__ == "__main__":
    main()
