"""Optimiser states, gradients and frozen weights, kept off the GPU while it does other work.

Adam's moments may stay in host memory between updates (`offload_moments_between_steps`): activations are freed before
the optimiser steps, so the peak is the larger of the two rather than their sum. `TrainerMemory` frees everything that
an update needs while colocated servers generate, `FrozenWeights` a teacher's weights while it does not score. Tested
on CPUs, where host and device memory are the same; transfers from and to CUDA have not been run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer

from eaopd_megatron.megatron.model import ModelChunks, wait_all_param_gathers

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def offload_moments_between_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move the moments (which exist already) to pinned host memory now and after each step, and back before it.

    The host's tensors stay the same ones; a checkpoint reads and fills them there.
    """
    pinned = torch.cuda.is_available()
    hosts = {
        (parameter, name): torch.empty_like(state[name], device="cpu", pin_memory=pinned)
        for parameter, state in optimizer.state.items()
        for name in ADAM_MOMENTS
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


class HostBackedStorages:
    """Storages on the device and their bytes in pinned host memory: they can be emptied, and filled again.

    Tensors keep their identity. While the storages are empty nothing may read them.
    """

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """The bytes are copied now."""
        pinned = torch.cuda.is_available()
        self._pairs: list[tuple[torch.UntypedStorage, torch.Tensor]] = []
        for storage in storages:
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            self._pairs.append((storage, host.copy_(_bytes_of(storage), non_blocking=True)))
        if pinned:
            torch.cuda.synchronize()

    @property
    def host_bytes(self) -> list[torch.Tensor]:
        """The bytes of each storage, uint8."""
        return [host for _, host in self._pairs]

    def offload(self) -> None:
        for storage, _ in self._pairs:
            storage.resize_(0)

    def onload(self) -> None:
        for storage, host in self._pairs:
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)


class FrozenWeights:
    """Weights that no update changes: in host memory but while they are `onload`ed. Leaving copies nothing."""

    def __init__(self, model: ModelChunks) -> None:
        """model: its weights are loaded, and each is a tensor of its own. They leave now."""
        self._parameters = list(model.parameters())  # tied ones once
        self._copies = HostBackedStorages(parameter.untyped_storage() for parameter in self._parameters)
        self._copies.offload()

    @contextlib.contextmanager
    def onload(self) -> Iterator[None]:
        """The model can run inside."""
        self._copies.onload()
        try:
            yield
        finally:
            self._copies.offload()

    def weight_on_device(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """One weight on the device, for as long as the caller keeps it, whether the others are there or not."""
        place = next(i for i, one in enumerate(self._parameters) if one is parameter)
        host = self._copies.host_bytes[place].view(parameter.dtype).view(parameter.shape)
        return host.to(parameter.device, non_blocking=True)


class TrainerMemory:
    """The device memory that an update needs and a generating server can have meanwhile.

    Released are the moments, main parameters of their own (in bf16) and the gradients, which are zero afterwards; the
    weights stay, and can be read. Tensors keep their identity: their storages are emptied and filled again. In between
    nothing may read them: no update, no checkpoint (`require_onloaded`).
    """

    def __init__(self, ddp: ModelChunks, optimizer: ChainedOptimizer) -> None:
        """ddp: chunks that `optimizer.wrap` made."""
        self._ddp, self._optimizer = ddp, optimizer
        self._copies: HostBackedStorages | None = None  # while released

    def offload(self) -> None:
        """States to pinned host memory, gradients away; a second call does nothing."""
        if self._copies is not None:
            return
        wait_all_param_gathers(self._ddp)
        self._copies = HostBackedStorages(self._own_storages())
        self._copies.offload()
        for chunk in self._ddp:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=torch.cuda.is_available())  # type: ignore[operator]

    def onload(self) -> None:
        """Everything where it was; a second call does nothing."""
        if self._copies is None:
            return
        self._copies.onload()
        for chunk in self._ddp:
            chunk.restore_grad_buffers(synchronize=torch.cuda.is_available())  # type: ignore[operator]
        self._copies = None

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


def require_onloaded(optimizer: ChainedOptimizer) -> None:
    """Raises RuntimeError while they are released: reading them would read freed memory."""
    if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in _states(optimizer)):
        raise RuntimeError("the optimiser's states are released: TrainerMemory.onload comes before a checkpoint")


def _states(optimizer: ChainedOptimizer) -> Iterator[torch.Tensor]:
    """Main parameters, which may be the weights themselves, and moments."""
    for part in optimizer.chained_optimizers:
        yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
        yield from (state[name] for state in part.optimizer.state.values() for name in ADAM_MOMENTS)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload,no-any-return]
