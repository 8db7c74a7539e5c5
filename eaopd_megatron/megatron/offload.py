"""Adam's moments in host memory between updates: the device has them only while it updates.

Activations are gone when the optimiser steps, so the peak of a step is the larger of the two, not their sum. Tested
on a CPU, where host and device are the same memory; the transfers from and to CUDA have not been run.
"""

from __future__ import annotations

from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


def keep_moments_on_host(optimizer: torch.optim.Optimizer) -> None:
    """Move the moments (which exist already) to pinned host memory now and after each step, and back before it.

    The host's tensors stay the same ones; a checkpoint reads and fills them there.
    """
    pinned = torch.cuda.is_available()
    hosts = {
        (parameter, name): torch.empty_like(state[name], device="cpu", pin_memory=pinned)
        for parameter, state in optimizer.state.items()
        for name in MOMENTS
    }

    def to_host(*unused: Any) -> None:
        for (parameter, name), host in hosts.items():
            host.copy_(optimizer.state[parameter][name], non_blocking=True)
            optimizer.state[parameter][name] = host
        if pinned:
            torch.cuda.current_stream().synchronize()  # who reads them on the host does not wait for the device

    def to_device(*unused: Any) -> None:
        for (parameter, name), host in hosts.items():
            moment = torch.empty_like(host, device=parameter.device, pin_memory=False)
            optimizer.state[parameter][name] = moment.copy_(host, non_blocking=True)

    to_host()
    optimizer.register_step_pre_hook(to_device)
    optimizer.register_step_post_hook(to_host)
