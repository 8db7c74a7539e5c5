"""What the rollout's client costs: responses a second through it and through bare sockets, on the same server.

    python tools/benchmark_rollout.py [--url URL --api-key-file FILE] [--requests N] [--rounds N] [--tokens N]

Without --url it starts a server of the Countdown student for as long as it runs. Both ways keep 64 requests running
and take turns, so that whatever else the machine does meets both alike. Then the processor time of this process a
request, with a double of the server, whose own time does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eaopd_megatron.data.types import SamplingParams  # noqa: E402
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, verify_server  # noqa: E402
from eaopd_megatron.rollout.sglang.requests import GenerateRequest, LengthLimits  # noqa: E402
from eaopd_megatron.rollout.sglang.server import SGLangSettings, sglang_servers  # noqa: E402
from eaopd_megatron.serving.http import SGLangClient, read_api_key  # noqa: E402
from eaopd_megatron.serving.pool import ServerPool  # noqa: E402
from eaopd_megatron.serving.supervisor import Supervisor  # noqa: E402

STUDENT = ROOT / "recipes/countdown/student"
CONCURRENT = 64
Way = Callable[[str, str | None, Sequence[GenerateRequest]], Coroutine[Any, Any, float]]


async def bare(url: str, key: str | None, requests: Sequence[GenerateRequest]) -> float:
    """Seconds that 64 sockets take, each with one request after the other: no library, no check of anything."""
    host, port = url.removeprefix("http://").split(":")
    secret = f"authorization: Bearer {key}\r\n" if key else ""
    texts = []
    for request in requests:
        body = json.dumps(request.body())
        head = f"POST /generate HTTP/1.1\r\nhost: {host}\r\n{secret}content-type: application/json\r\n"
        texts.append(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    left = iter(texts)
    started = time.perf_counter()

    async def worker() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for text in left:
            writer.write(text)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert head.split(" ")[1] == "200", head
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            json.loads(await reader.readexactly(length))
        writer.close()

    await asyncio.gather(*(worker() for _ in range(CONCURRENT)))
    return time.perf_counter() - started


async def pooled(url: str, key: str | None, requests: Sequence[GenerateRequest]) -> float:
    """Seconds that the rollout's client takes, with its checks of requests and answers, once it has its server."""

    async def admit(client: SGLangClient) -> LengthLimits:
        return await verify_server(client, ExpectedModel("Qwen3ForCausalLM", 112, 32))

    pool = ServerPool([SGLangClient(url, api_key=key, connections=CONCURRENT)], admit, report=lambda _: None)
    await pool.open()
    started = time.perf_counter()
    answered = {completion.id async for completion in pool.run(requests)}
    seconds = time.perf_counter() - started
    await pool.close()
    assert len(answered) == len(requests)
    return seconds


def compare(url: str, key: str | None, requests: Sequence[GenerateRequest], rounds: int) -> None:
    """Prints responses a second of both ways, by turns, and the medians' ratio."""
    ways: dict[str, Way] = {"bare": bare, "pool": pooled}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    asyncio.run(bare(url, key, requests[:CONCURRENT]))  # the server's first requests are slow
    for turn in range(rounds):
        for name in ways if turn % 2 else reversed(ways):
            rates[name].append(len(requests) / asyncio.run(ways[name](url, key, requests)))
    for name, found in rates.items():
        shown = " ".join(f"{rate:.0f}" for rate in found)
        print(f"{name}: median {statistics.median(found):.0f} responses/s ({shown})")
    ratio = statistics.median(rates["pool"]) / statistics.median(rates["bare"])
    print(f"pool / bare: {ratio:.1%} over {rounds} rounds of {len(requests)} requests, {CONCURRENT} at a time")


def processor_time(requests: Sequence[GenerateRequest]) -> None:
    """Prints milliseconds of this process a request, with the double as another process."""
    command = [sys.executable, "-u", "-m", "tools.sglang_double.server"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as double:
        assert double.stdout is not None
        url = double.stdout.readline().split()[0]
        for name, way in (("bare", bare), ("pool", pooled)):
            asyncio.run(way(url, None, requests[:CONCURRENT]))
            started = time.process_time()
            asyncio.run(way(url, None, requests))
            print(f"{name}: {1000 * (time.process_time() - started) / len(requests):.2f} ms processor time a request")
        double.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server of the Countdown student")
    parser.add_argument("--api-key-file", type=Path)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens a request")
    arguments = parser.parse_args()
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=arguments.tokens, stop_token_ids=())
    requests = [GenerateRequest(f"r{i}", [1 + i % 12, 20, 40 + i % 7, 3], sampling) for i in range(arguments.requests)]
    key = read_api_key(arguments.api_key_file) if arguments.api_key_file else None
    if arguments.url:
        compare(arguments.url, key, requests, arguments.rounds)
    else:
        settings = SGLangSettings(
            STUDENT, 128, precision="fp32", mem_fraction_static=0.1, max_concurrent_requests=CONCURRENT, api_key=key
        )
        with tempfile.TemporaryDirectory() as logs, Supervisor(sglang_servers(settings, 1, Path(logs))) as supervisor:
            compare(supervisor.servers[0].url, key, requests, arguments.rounds)
    processor_time(requests)


if __name__ == "__main__":
    main()
