"""Optimiser states, gradients and frozen weights away from the device while it has other work.

Adam's moments can be in host memory between updates (`keep_moments_on_host`): activations are gone when the optimiser
steps, so the peak of a step is the larger of the two, not their sum. All of it can leave while servers on the same
device generate (`TrainerMemory`), and a teacher's weights while it does not score (`FrozenWeights`). Tested on a CPU,
where host and device are the same memory; the transfers from and to CUDA have not been run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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


class HostCopies:
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
    def hosts(self) -> list[torch.Tensor]:
        """The bytes of each storage, uint8."""
        return [host for _, host in self._pairs]

    def empty(self) -> None:
        for storage, _ in self._pairs:
            storage.resize_(0)

    def fill(self) -> None:
        for storage, host in self._pairs:
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)


class FrozenWeights:
    """Weights that no update changes: in host memory but while they are `present`. Leaving copies nothing."""

    def __init__(self, model: ModelChunks) -> None:
        """model: its weights are loaded, and each is a tensor of its own. They leave now."""
        self._parameters = list(model.parameters())  # tied ones once
        self._copies = HostCopies(parameter.untyped_storage() for parameter in self._parameters)
        self._copies.empty()

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """The model can run inside."""
        self._copies.fill()
        try:
            yield
        finally:
            self._copies.empty()

    def copy_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """One weight on the device, for as long as the caller keeps it, whether the others are there or not."""
        place = next(i for i, one in enumerate(self._parameters) if one is parameter)
        host = self._copies.hosts[place].view(parameter.dtype).view(parameter.shape)
        return host.to(parameter.device, non_blocking=True)


class TrainerMemory:
    """The device memory that an update needs and a generating server can have meanwhile.

    Released are the moments, main parameters of their own (in bf16) and the gradients, which are zero afterwards; the
    weights stay, and can be read. Tensors keep their identity: their storages are emptied and filled again. In between
    nothing may read them: no update, no checkpoint (`require_states`).
    """

    def __init__(self, ddp: ModelChunks, optimizer: ChainedOptimizer) -> None:
        """ddp: chunks that `optimizer.wrap` made."""
        self._ddp, self._optimizer = ddp, optimizer
        self._copies: HostCopies | None = None  # while released

    def release(self) -> None:
        """States to pinned host memory, gradients away; a second call does nothing."""
        if self._copies is not None:
            return
        wait_for_gathers(self._ddp)
        self._copies = HostCopies(self._own_storages())
        self._copies.empty()
        for chunk in self._ddp:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=torch.cuda.is_available())  # type: ignore[operator]

    def resume(self) -> None:
        """Everything where it was; a second call does nothing."""
        if self._copies is None:
            return
        self._copies.fill()
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
