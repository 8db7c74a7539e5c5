"""Check the weight-update group between two processes that share a device, and the trainer when the server dies.

    python tools/gpu_check/update_group.py

The trainer's side is the project's UpdateGroup. The server's side makes the same torch calls as SGLang. With CUDA both
processes use GPU 0: a different NCCL_HOSTID makes NCCL treat them as two hosts. Without CUDA: gloo.
"""

from __future__ import annotations

import base64
import os
import pickle
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

from eaopd_megatron.utils.gpu_environment import UPDATE_GROUP_VARIABLES

os.environ.update(UPDATE_GROUP_VARIABLES)  # before torch reads them
os.environ.update(NCCL_HOSTID=str(os.getpid()), NCCL_IB_DISABLE="1", NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")

import torch
import torch.distributed as dist
from torch.distributed import rendezvous

from eaopd_megatron.checkpoint.safetensors_io import PlannedTensor
from eaopd_megatron.rollout.weight_sync.distributed_transport import UpdateGroup, join_process_group
from eaopd_megatron.rollout.weight_sync.local_transports import serialize_bucket
from eaopd_megatron.rollout.weight_sync.transport import Bucket
from eaopd_megatron.utils.ports import listening_store
from tools.gpu_check.findings import record

CUDA = torch.cuda.is_available()
BACKEND, DEVICE = ("nccl", "cuda") if CUDA else ("gloo", "cpu")
SIZES = ((1_000_000, torch.bfloat16), (2_000_000, torch.uint8))
SECONDS = 8.0


def start_world() -> None:
    store = listening_store()
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo", store=store, rank=0, world_size=1)


def serve(port: int, name: str) -> None:
    """Receive the broadcasts, open the handles and die without leaving the group."""
    start_world()
    store, _, _ = next(rendezvous(f"tcp://127.0.0.1:{port}", 1, 2, timeout=timedelta(seconds=30)))
    group = join_process_group(store, name, 1, 2, BACKEND, 30.0)
    for size, dtype in SIZES:
        received = torch.zeros(size, dtype=dtype, device=DEVICE)
        dist.broadcast(received, src=0, group=group)
        record(f"server's sum of a broadcast in {dtype}", float(received.float().sum()), bool((received == 1).all()))
    if CUDA:
        print(open_handles(sys.stdin.readline()), flush=True)
    os._exit(9)


def open_handles(line: str) -> str:
    """Open CUDA IPC handles as SGLang does: the GPU is named by its UUID."""
    import torch.multiprocessing.reductions

    reductions: Any = torch.multiprocessing.reductions
    original = reductions.rebuild_cuda_tensor

    def rebuild(*arguments: Any) -> Any:
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        return original(*arguments[:6], uuids.index(str(arguments[6])), *arguments[7:])

    reductions.rebuild_cuda_tensor = rebuild
    sums = {name: float(tensor.float().sum()) for name, tensor in pickle.loads(base64.b64decode(line))}
    record("sums that the server reads through CUDA IPC handles", sums, sums == {"a": 2048.0, "b": 6144.0})
    return "server: handles opened"


def train() -> None:
    if CUDA:
        torch.cuda.set_device(0)
    start_world()
    group = UpdateGroup("weights-check-1", 1, "127.0.0.1", seconds=SECONDS)
    server = subprocess.Popen(
        [sys.executable, __file__, "server", str(group.port), group.name], stdin=subprocess.PIPE, text=True
    )
    while not group.arrived():
        time.sleep(0.01)
    started = time.monotonic()
    group.join(BACKEND)
    record("seconds to join", round(time.monotonic() - started, 2))
    for size, dtype in SIZES:
        started = time.monotonic()
        group.broadcast(torch.ones(size, dtype=dtype, device=DEVICE)).wait(timedelta(seconds=20))
        record(f"seconds of a broadcast in {dtype}", round(time.monotonic() - started, 3))
    if CUDA:
        data = torch.cat([torch.full((2048,), 1.0), torch.full((2048,), 3.0)]).to("cuda", torch.bfloat16)
        specs = [PlannedTensor("a", (64, 32), torch.bfloat16), PlannedTensor("b", (2048,), torch.bfloat16)]
        bucket, strings = Bucket(data.view(torch.uint8), specs), []
        thread = threading.Thread(target=lambda: strings.append(serialize_bucket(bucket)))  # as the event loop's does
        thread.start()
        thread.join()
        assert server.stdin is not None
        server.stdin.write(strings[0] + "\n")
        server.stdin.flush()
    record("exit code of the server, which dies in an update", server.wait(60), server.returncode == 9)
    started = time.monotonic()
    try:
        group.broadcast(torch.ones(1_000_000, device=DEVICE)).wait(timedelta(seconds=SECONDS))
        record("a broadcast to a dead server", "returned without an error", False)
    except RuntimeError as error:
        text = f"RuntimeError after {time.monotonic() - started:.1f} s: {str(error).splitlines()[0][:100]}"
        record("a broadcast to a dead server", text, True)
    started = time.monotonic()
    group.leave()
    record("seconds to leave", round(time.monotonic() - started, 2))
    works = torch.ones(4, device=DEVICE)
    dist.all_reduce(works)
    record("the device and the default group work on", works.tolist(), works.tolist() == [1.0] * 4)
    time.sleep(3)
    record("no watchdog has ended the trainer", True, True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["server"]:
        serve(int(sys.argv[2]), sys.argv[3])
    train()
