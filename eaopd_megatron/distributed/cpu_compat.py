"""Megatron-Core on machines without CUDA: its literal uses of "cuda" are redirected to the CPU.

Megatron-Core 0.16 hard-codes the device "cuda" in about ten places (schedules, gradient clipping, optimisers,
checkpoints). With CUDA nothing here has an effect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _CudaAsCpuMode(TorchFunctionMode):
    """Redirect `device="cuda"`, `.cuda()`, `.to("cuda")` and `pin_memory=True` to the CPU.

    `Tensor.type()` returns the CUDA names that Megatron-Core's assertions expect.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _TYPE_NAMES.get(args[0].dtype, func(*args))
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], torch.device("cpu"), *args[2:])
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": torch.device("cpu")}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_as_cpu() -> Iterator[None]:
    """Run Megatron-Core code that hard-codes the device "cuda". No effect with CUDA.

    A scope rather than a process-wide mode, which would cost a quarter of a tiny model's step time.
    """
    if torch.cuda.is_available():
        yield
        return
    with _CudaAsCpuMode():
        yield


class _TorchOnCpu:
    """`torch` as Megatron-Core's schedules see it, where one counter is allocated on "cuda".

    Replacing that module's `torch` avoids running the whole forward and backward pass under `cuda_as_cpu`.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if _is_cuda(device) else device, **options)


class _Stream:
    """A stand-in for a CUDA stream and its event, on which everything is synchronous.

    The token dispatcher of experts copies its counts to the host on a side stream.
    """

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


_THE_STREAM = _Stream()


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Return the dispatcher's counts, which collectives take as numpy arrays."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def install_cpu_compat() -> None:
    """Replace `torch.cuda`'s current device, synchronisation, streams and RNG state by CPU versions.

    Idempotent; no effect with CUDA. Raises ImportError if Megatron-Core moved what is replaced.
    """
    if torch.cuda.is_available():
        return
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    for module, name in ((megatron_random, "_set_cuda_rng_state"), (token_dispatcher, "maybe_move_tensor_to_cpu")):
        if not hasattr(module, name):
            raise ImportError(f"megatron-core moved {module.__name__}.{name}: adapt distributed/cpu_compat.py")
    if getattr(schedules, "torch", None) is None:
        raise ImportError("megatron-core moved the schedules' use of torch: adapt distributed/cpu_compat.py")
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.Stream = _Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: _THE_STREAM  # type: ignore[assignment,return-value]
    torch.cuda.stream = contextlib.nullcontext  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _on_host
    schedules.torch = _TorchOnCpu()  # type: ignore[assignment]
