"""Optimiser states, gradients and frozen weights, kept off the GPU while it does other work.

Adam's moments may stay in host memory between updates (`offload_moments_between_steps`): activations are freed before
the optimiser steps, so the peak is the larger of the two rather than their sum. `TrainerMemory` frees everything that
an update needs while colocated servers generate, `FrozenWeights` a teacher's weights while it does not score. Tested
on CPUs.
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
    """Keep existing moments in pinned host memory; step hooks copy them to the GPU before a step and back after it.

    The host tensors keep their identity, and checkpoints read and fill them there.
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
            torch.cuda.current_stream().synchronize()  # readers on the host do not synchronise with the GPU

    def to_device(*unused: Any) -> None:
        for (parameter, name), host in hosts.items():
            moment = torch.empty_like(host, device=parameter.device, pin_memory=False)
            optimizer.state[parameter][name] = moment.copy_(host, non_blocking=True)

    to_host()
    optimizer.register_step_pre_hook(to_device)
    optimizer.register_step_post_hook(to_host)


class HostBackedStorages:
    """GPU storages with copies in pinned host memory, which can be freed and restored.

    Tensors keep their identity. Nothing may read them while they are offloaded.
    """

    def __init__(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Copy the storages to the host."""
        pinned = torch.cuda.is_available()
        self.pairs: list[tuple[torch.UntypedStorage, torch.Tensor]] = []  # and its host copy, uint8
        for storage in storages:
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            self.pairs.append((storage, host.copy_(_bytes_of(storage), non_blocking=True)))
        if pinned:
            torch.cuda.synchronize()

    def offload(self) -> None:
        for storage, _ in self.pairs:
            storage.resize_(0)

    def onload(self) -> None:
        for storage, host in self.pairs:
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)


class FrozenWeights:
    """Frozen weights, kept in host memory and copied to the GPU inside `onload()`; offloading copies nothing back."""

    def __init__(self, model: ModelChunks) -> None:
        """Offload the loaded weights, each of which must be a separate tensor."""
        self._parameters = list(model.parameters())  # yields tied weights once
        self._copies = HostBackedStorages(parameter.untyped_storage() for parameter in self._parameters)
        self._copies.offload()

    @contextlib.contextmanager
    def onload(self) -> Iterator[None]:
        """Have the weights on the GPU inside the context."""
        self._copies.onload()
        try:
            yield
        finally:
            self._copies.offload()

    def weight_on_device(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Return a GPU copy of one weight, whether the weights are onloaded or not."""
        index = next(i for i, candidate in enumerate(self._parameters) if candidate is parameter)
        host = self._copies.pairs[index][1].view(parameter.dtype).view(parameter.shape)
        return host.to(parameter.device, non_blocking=True)


class TrainerMemory:
    """The GPU memory of an update, which colocated servers may use while they generate.

    Offloads the moments, the fp32 main parameters of bf16 weights, and the gradients, which are zero afterwards. The
    weights stay readable. Tensors keep their identity; while they are offloaded nothing may read them: no update, no
    checkpoint (`require_onloaded`).
    """

    def __init__(self, ddp: ModelChunks, optimizer: ChainedOptimizer) -> None:
        """ddp: chunks from `optimizer.wrap_ddp`."""
        self._ddp, self._optimizer = ddp, optimizer
        self._copies: HostBackedStorages | None = None  # while offloaded

    def offload(self) -> None:
        """Copy the states to pinned host memory and free the gradients. Idempotent."""
        if self._copies is not None:
            return
        wait_all_param_gathers(self._ddp)
        self._copies = HostBackedStorages(self._own_storages())
        self._copies.offload()
        for chunk in self._ddp:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=torch.cuda.is_available())  # type: ignore[operator]

    def onload(self) -> None:
        """Restore the states and zeroed gradients. Idempotent."""
        if self._copies is None:
            return
        self._copies.onload()
        for chunk in self._ddp:
            chunk.restore_grad_buffers(synchronize=torch.cuda.is_available())  # type: ignore[operator]
        self._copies = None

    def _own_storages(self) -> list[torch.UntypedStorage]:
        """Return the optimiser's own storages on the GPU: with fp32 weights its main parameters are the weights."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self._ddp.parameters()}
        device = next(self._ddp.parameters()).device
        storages: dict[int, torch.UntypedStorage] = {}
        for tensor in _states(self._optimizer):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights and storage.device == device and storage.nbytes():
                storages[storage.data_ptr()] = storage
        return list(storages.values())


def require_onloaded(optimizer: ChainedOptimizer) -> None:
    """Raise RuntimeError while the optimiser's states are offloaded: reading them would read freed memory."""
    if any(tensor.numel() and not tensor.untyped_storage().nbytes() for tensor in _states(optimizer)):
        raise RuntimeError("the optimiser's states are offloaded: call TrainerMemory.onload before a checkpoint")


def _states(optimizer: ChainedOptimizer) -> Iterator[torch.Tensor]:
    """Yield main parameters, which may be the weights themselves, and moments."""
    for part in optimizer.chained_optimizers:
        yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
        yield from (state[name] for state in part.optimizer.state.values() for name in ADAM_MOMENTS)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload,no-any-return]
