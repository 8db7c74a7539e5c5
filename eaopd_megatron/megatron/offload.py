"""Optimiser states and gradients away from the device while it has other work.

Adam's moments can be in host memory between updates (`keep_moments_on_host`): activations are gone when the optimiser
steps, so the peak of a step is the larger of the two, not their sum. And all of it can leave while servers on the same
device generate (`TrainerMemory`). Tested on a CPU, where host and device are the same memory; the transfers from and to
CUDA have not been run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer

from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.overlap import wait_for_gathers

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


class TrainerMemory:
    """The device memory that an update needs and a generating server can have meanwhile.

    Released are the moments, main parameters of their own (in bf16) and the gradients, which are zero afterwards; the
    weights stay, and can be read. Tensors keep their identity: their storages are emptied and filled again. In between
    nothing may read them: no update, no checkpoint (`require_states`).
    """

    def __init__(self, ddp: ModelChunks, optimizer: ChainedOptimizer) -> None:
        """ddp: chunks that `optimizer.wrap` made."""
        self._ddp, self._optimizer = ddp, optimizer
        self._hosts: list[tuple[torch.UntypedStorage, torch.Tensor]] | None = None  # while released

    def release(self) -> None:
        """States to pinned host memory, gradients away; a second call does nothing."""
        if self._hosts is not None:
            return
        cuda = torch.cuda.is_available()
        wait_for_gathers(self._ddp)
        self._hosts = []
        for storage in self._own_storages():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=cuda)
            self._hosts.append((storage, host.copy_(_bytes_of(storage), non_blocking=True)))
        if cuda:
            torch.cuda.synchronize()
        for storage, _ in self._hosts:
            storage.resize_(0)
        for chunk in self._ddp:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=cuda)  # type: ignore[operator]

    def resume(self) -> None:
        """Everything where it was; a second call does nothing."""
        for storage, host in self._hosts or ():
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)
        if self._hosts is not None:
            for chunk in self._ddp:
                chunk.restore_grad_buffers(synchronize=torch.cuda.is_available())  # type: ignore[operator]
        self._hosts = None

    def _own_storages(self) -> list[torch.UntypedStorage]:
        """What the optimiser has of its own on the device: in fp32 its main parameters are the weights themselves."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._ddp.parameters()}
        device = next(self._ddp.parameters()).device
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in _states(self._optimizer):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and storage.device == device and storage.nbytes():
                found[storage.data_ptr()] = storage
        return list(found.values())


def require_states(optimizer: ChainedOptimizer) -> None:
    """Raises RuntimeError while they are released: reading them would read freed memory."""
    if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in _states(optimizer)):
        raise RuntimeError("the optimiser's states are released: TrainerMemory.resume comes before a checkpoint")


def _states(optimizer: ChainedOptimizer) -> Iterator[torch.Tensor]:
    """Main parameters, which may be the weights themselves, and moments."""
    for part in optimizer.chained_optimizers:
        yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
        yield from (state[name] for state in part.optimizer.state.values() for name in MOMENTS)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload,no-any-return]
