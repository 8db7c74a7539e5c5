"""Do the ranks of all nodes reach each other, and how fast? An all-reduce over NCCL, over gloo where there is no GPU.

With CUDA it has not been run.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from eaopd_megatron.errors import UserError
from eaopd_megatron.guard import say

MIB = 256
"""Of one all-reduce on GPUs."""
ROUNDS = 5


def probe(minutes: float = 3.0) -> None:
    """Joins the step's ranks and prints one line with the bus bandwidth. Raises UserError where the sum is wrong, or
    the ranks do not meet in time."""
    cuda = torch.cuda.is_available()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        values = torch.ones((MIB if cuda else 1) * 2**20 // 4, device=device)
        dist.all_reduce(values)  # makes the connections
        started = time.perf_counter()
        for _ in range(ROUNDS):
            values.fill_(float(rank + 1))
            dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / ROUNDS
    except RuntimeError as error:  # torch's distributed errors are
        raise UserError(
            f"the ranks do not reach each other over {backend}: {' '.join(str(error).split())[:300]} (EAOPD_INTERFACE "
            "names their network)"
        ) from None
    if values[0] != (expected := world_size * (world_size + 1) / 2):
        raise UserError(f"an all-reduce over {backend} gave {float(values[0])} for {expected}: the network is faulty")
    bus = 2 * (world_size - 1) / world_size * values.numel() * 4 / seconds / 1e9
    say(f"{backend}: {world_size} ranks reach each other, all-reduce at {bus:.1f} GB/s")
    dist.destroy_process_group()
