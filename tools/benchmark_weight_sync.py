"""Measure a server's weight update: time and host memory, for a model of 1 GB between two gloo processes.

    python tools/benchmark_weight_sync.py [--bucket-mib N] [--rounds N]

The other process stands in for a server and receives weights as the real one does: into new memory, then into its
model. Three methods alternate, so that other load on the machine affects all alike:

    bare    one broadcast of the same number of bytes into allocated memory
    plain   one broadcast per tensor, received as the server does; no HTTP, no buckets, no gathering
    update  the trainer's update after every iteration

Memory is the trainer's increase over its use before the first update.
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from eaopd_megatron.checkpoint.convert import single_process_group  # noqa: E402
from eaopd_megatron.checkpoint.hf_folder import HfFolder  # noqa: E402
from eaopd_megatron.config import schema  # noqa: E402
from eaopd_megatron.megatron.model import build_model  # noqa: E402
from eaopd_megatron.rollout.weight_sync.distributed_transport import UpdateGroup  # noqa: E402
from eaopd_megatron.rollout.weight_sync.session import UpdateSession  # noqa: E402
from eaopd_megatron.rollout.weight_sync.updater import WeightUpdater  # noqa: E402
from eaopd_megatron.serving.http import SGLangClient  # noqa: E402
from tools.lib.host_memory import growth  # noqa: E402
from tools.sglang_double.processes import in_a_loop  # noqa: E402
from tools.sglang_double.server import Double  # noqa: E402

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
}
SECONDS = 300.0


class Receiving(Double):
    """A server stand-in that also receives the two simple methods."""

    async def _post_bare(self, body: dict[str, Any]) -> None:
        self.whole = getattr(self, "whole", None)
        if self.whole is None:
            self.whole = torch.ones(body["bytes"], dtype=torch.uint8)
        group = self._receiver._groups[body["group_name"]]
        await asyncio.to_thread(dist.broadcast, self.whole, group_src=0, group=group)

    async def _post_plain(self, body: dict[str, Any]) -> None:
        await asyncio.to_thread(self._take, body)

    def _take(self, body: dict[str, Any]) -> None:
        for name, dtype, shape in body["tensors"]:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, group_src=0, group=self._receiver._groups[body["group_name"]])
            self.load_weights({name: tensor})


async def receive() -> None:
    """The other process."""
    async with Receiving() as double:
        print(double.url, flush=True)
        await double.dead.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        asyncio.run(receive())
        return
    other = subprocess.Popen([sys.executable, __file__, "--receive"], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        measure(other.stdout.readline().strip(), arguments.bucket_mib, arguments.rounds)
    finally:
        other.kill()
        other.wait()


def measure(url: str, bucket_mib: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as place, single_process_group() as parallel, in_a_loop() as run:
        Path(place, "config.json").write_text(json.dumps(CONFIG))
        folder = HfFolder.open(place)
        model = build_model(folder.config, parallel.layout, torch.bfloat16)
        for number, parameter in enumerate(model.parameters()):
            parameter.data.fill_(number)
        shapes = folder.family.hf_shapes(folder.config)
        client = SGLangClient(url)
        options = schema.WeightSyncConfig(bucket_mib=bucket_mib, timeout_seconds=SECONDS, address="127.0.0.1")
        sync = WeightUpdater(model, folder, parallel, options, Path(place), run, report=print)
        version = iter(range(1, 10**6))

        def update() -> None:
            failed = sync.update(next(version), [client])
            assert not failed, failed

        extra = growth(update)
        group = UpdateGroup("plain", 1, "127.0.0.1", seconds=SECONDS)
        session = UpdateSession(SECONDS)
        begin = partial(run_in_background, run, session, client)
        invited = begin("/init_weights_update_group", invitation(group))
        group.join("gloo")
        run(finished(invited))
        tensors = [(name, torch.ones(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()]
        size = sum(tensor.nbytes for _, tensor in tensors)
        whole = torch.ones(size, dtype=torch.uint8)

        def bare() -> None:
            told = begin("/bare", {"group_name": group.name, "bytes": size})
            group.broadcast(whole).wait()
            run(finished(told))

        def plain() -> None:
            listed = [[name, "bfloat16", list(tensor.shape)] for name, tensor in tensors]
            told = begin("/plain", {"group_name": group.name, "tensors": listed})
            for _, tensor in tensors:
                group.broadcast(tensor).wait()
            run(finished(told))

        report(size, extra, bucket_mib, timed({"bare": bare, "plain": plain, "update": update}, rounds))
        run(client.close())


def timed(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return each method's seconds per round, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(size: int, extra: int, bucket_mib: int, seconds: dict[str, list[float]]) -> None:
    bucket = bucket_mib * 2**20
    print(f"{size / 1e9:.2f} GB in buckets of {bucket_mib} MiB, {len(seconds['update'])} rounds")
    print(f"memory: {extra / 2**20:.0f} MiB more than before the update: {extra / bucket:.2f} buckets")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:7} {medians[name]:6.2f} s ({min(values):.2f} to {max(values):.2f})")
    for name in ("plain", "bare"):
        print(f"update / {name}: {medians['update'] / medians[name]:.2f}")


def invitation(group: UpdateGroup) -> dict[str, Any]:
    return {
        "master_address": group.address,
        "master_port": group.port,
        "rank_offset": 1,
        "world_size": group.world_size,
        "group_name": group.name,
        "backend": "gloo",
    }


def run_in_background(
    run: Any, session: UpdateSession, client: SGLangClient, path: str, body: dict[str, Any]
) -> asyncio.Task[Any]:
    async def begin() -> asyncio.Task[Any]:
        return asyncio.create_task(session.post(client, path, body))

    task: asyncio.Task[Any] = run(begin())
    return task


async def finished(task: asyncio.Task[Any]) -> Any:
    return await task


if __name__ == "__main__":
    main()
