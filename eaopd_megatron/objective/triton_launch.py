"""Dispatch to the Triton kernels: when they are used, and with which block sizes.

The kernels serve CUDA tensors of fp32, bf16 or fp16 with contiguous rows, where Triton is installed (torch for CUDA
includes it). Everything else, fp64 too, runs the torch code, which is their reference. Triton is imported on the first
launch. Block sizes are autotuned on the GPU once for each kind of input; in Triton's interpreter they are fixed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_SUMS_AUTOTUNE_ROWS = 4096
_MAX_GRADIENT_AUTOTUNE_ROWS = 512  # the gradient of an attempt needs memory of its own
MIN_AUTOTUNE_ROWS = 256
END_OF_COLUMNS = 2**31 - 1  # terminates a list of columns; larger than any
_forced: bool | None = None


@contextlib.contextmanager
def force_kernels(enabled: bool) -> Iterator[None]:
    """For tests: inside, use the kernels wherever they can run, or nowhere, whatever the device.

    CPU tensors run in Triton's interpreter alone: TRITON_INTERPRET=1 must be set before Triton is imported.
    """
    global _forced
    before, _forced = _forced, enabled
    try:
        yield
    finally:
        _forced = before


def uses_kernels(*logits: Tensor | None) -> bool:
    """Return whether the Triton kernels process these logits (None: absent); otherwise the torch code does."""
    tensors = [value for value in logits if value is not None]
    enabled = all(value.is_cuda for value in tensors) if _forced is None else _forced
    return (
        enabled
        and _has_triton()
        and all(value.dtype in _DTYPES and (value.shape[1] == 1 or value.stride(1) == 1) for value in tensors)
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class BlockConfig:
    """Columns per step of a program (`depth` runs of `lanes`), and the warps and stages it is compiled for."""

    depth: int
    lanes: int
    warps: int
    stages: int


# With 16-bit logits a warp reads 256 columns at once, so the sums of a run stay in one thread.
_SUMS_SIZES = (
    *((2, 2048, 8, 2), (2, 2048, 8, 3), (4, 2048, 8, 2), (2, 1024, 4, 3)),
    *((4, 1024, 4, 2), (4, 1024, 4, 3), (4, 512, 2, 3), (4, 256, 1, 3)),
)
SUMS_CONFIGS = tuple(BlockConfig(*sizes) for sizes in _SUMS_SIZES)
_GRADIENT_SIZES = (1, 4096, 8, 2), (1, 2048, 4, 2), (1, 2048, 8, 3), (1, 4096, 4, 2), (1, 8192, 8, 1), (1, 1024, 4, 3)
GRADIENT_CONFIGS = tuple(BlockConfig(*sizes) for sizes in _GRADIENT_SIZES)
INTERPRETER_CONFIG = BlockConfig(2, 16, 4, 1)


def launch_sums(
    sums: Mapping[str, Tensor],
    student: Tensor,
    teacher: Tensor | None,
    num_valid: int,
    exclude: tuple[Tensor, Tensor] | None,
    has_neg_inf: bool,
) -> None:
    """Fill the fp32 sums of `vocab_parallel.partial_sums` from num_valid >= 1 columns.

    student, teacher: [tokens, vocab/tp]; exclude: (columns, owned) [tokens, k].
    """
    from eaopd_megatron.objective.triton_kernels import sums_kernel

    n = student.shape[0]
    if n == 0:
        return
    unused = sums["student"]
    excluded = unused if exclude is None else _sorted_columns(*exclude)[0]
    other = student if teacher is None else teacher
    arguments = (
        *(student, other, sums["student"], sums.get("teacher", unused), sums.get("gap", unused)),
        *(sums.get("student_tail", unused), sums.get("teacher_tail", unused), excluded),
        *(student.stride(0), other.stride(0), excluded.stride(0), n, num_valid),
    )
    flags = {"HAS_TEACHER": teacher is not None, "HAS_TAIL": exclude is not None, "HAS_NEG_INF": has_neg_inf}
    kind = ("sums", *flags.values(), student.dtype, other.dtype, student.device)

    def attempt(config: BlockConfig, rows: int) -> None:
        _start(sums_kernel, arguments, flags, config, rows, student.device)

    attempt(autotuned_config(SUMS_CONFIGS, kind, num_valid, min(n, _MAX_SUMS_AUTOTUNE_ROWS), attempt), n)


@dataclass(frozen=True)
class GradientFactors:
    """Factors of the gradient, which include the upstream gradient and 1 / Z: fp32 [tokens] unless noted."""

    student_max: Tensor  # m_s
    kappa: Tensor
    reverse: Tensor | None  # w_R
    teacher_max: Tensor | None  # m_t
    forward: Tensor | None  # w_F g
    token: tuple[Tensor, Tensor] | None  # the sampled token's column and its addend, 0 where another rank owns it
    top_k: tuple[Tensor, Tensor, Tensor] | None  # columns of S, owned, addends, each [tokens, k]
    top_k_kappa: Tensor | None


def launch_gradient(
    factors: GradientFactors,
    student: Tensor,
    teacher: Tensor | None,
    rows: Tensor | None,
    num_valid: int,
    has_neg_inf: bool,
    out: Tensor,
) -> None:
    """Write the gradient of some rows (None: all) into the num_valid >= 1 valid columns of `out` [tokens, vocab/tp].

    `out` may be `student`. teacher: its logits of these rows, if factors.reverse or factors.forward is set.
    """
    from eaopd_megatron.objective.triton_kernels import gradient_kernel

    n = student.shape[0]
    programs = n if rows is None else len(rows)
    if programs == 0:
        return
    zero = torch.zeros_like(factors.kappa)
    given = (
        *(factors.student_max, factors.kappa, factors.reverse, factors.teacher_max, factors.forward),
        *(factors.top_k_kappa, None if factors.token is None else factors.token[1]),
    )
    packed = torch.stack([zero if value is None else value for value in given])
    tokens, columns, addends = zero, zero, zero
    if factors.token is not None:
        tokens = factors.token[0].int()
    if factors.top_k is not None:
        columns, order = _sorted_columns(*factors.top_k[:2])
        addends = torch.nn.functional.pad(factors.top_k[2].gather(1, order), (0, 1))
    other = student if teacher is None else teacher
    flags = {
        "HAS_REVERSE": factors.reverse is not None,
        "HAS_FORWARD": factors.forward is not None,
        "HAS_TOKEN": factors.token is not None,
        "HAS_TOP_K": factors.top_k is not None,
        "HAS_TOP_K_KAPPA": factors.top_k_kappa is not None,
        "HAS_NEG_INF": has_neg_inf,
    }
    kind = ("gradient", *flags.values(), student.dtype, other.dtype, out.dtype, student.device)

    def write(config: BlockConfig, count: int, some: Tensor | None, target: Tensor) -> None:
        arguments = (
            *(student, other, target, packed, zero if some is None else some, tokens, columns, addends),
            *(student.stride(0), other.stride(0), target.stride(0), columns.stride(0), n, num_valid),
        )
        _start(gradient_kernel, arguments, {"HAS_ROWS": some is not None, **flags}, config, count, student.device)

    def attempt(config: BlockConfig, count: int) -> None:  # not into out, which may still hold the logits
        write(config, count, None, torch.empty(count, out.stride(0), dtype=out.dtype, device=out.device))

    tuning_rows = min(programs, _MAX_GRADIENT_AUTOTUNE_ROWS)
    write(autotuned_config(GRADIENT_CONFIGS, kind, num_valid, tuning_rows, attempt), programs, rows, out)


def _sorted_columns(columns: Tensor, owned: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's columns in ascending order [tokens, k + 1], unowned and last END_OF_COLUMNS; and the order."""
    values, order = torch.where(owned, columns, END_OF_COLUMNS).int().sort(1)
    return torch.nn.functional.pad(values, (0, 1), value=END_OF_COLUMNS), order


def _start(
    kernel: triton.JITFunction,
    arguments: tuple[Tensor | int, ...],
    flags: Mapping[str, bool],
    config: BlockConfig,
    programs: int,
    device: torch.device,
) -> None:
    shape = {"DEPTH": config.depth, "LANES": config.lanes, "STAGES": config.stages, "num_warps": config.warps}
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[(programs,)](*arguments, **flags, **shape)


_best: dict[Hashable, BlockConfig] = {}


def autotuned_config(
    candidates: tuple[BlockConfig, ...],
    kind: tuple[Hashable, ...],
    num_valid: int,
    rows: int,
    attempt: Callable[[BlockConfig, int], None],
) -> BlockConfig:
    """Return the candidate with the fastest attempt(candidate, rows) for this kind of input and about this size.

    Block sizes change the order of additions: with torch.use_deterministic_algorithms the first candidate is used.
    """
    from eaopd_megatron.objective.triton_kernels import INTERPRETED

    if INTERPRETED:
        return INTERPRETER_CONFIG
    if rows < MIN_AUTOTUNE_ROWS or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    key = (*kind, num_valid.bit_length(), rows.bit_length())
    if key not in _best:
        _best[key] = min(candidates, key=lambda config: measure_ms(attempt, config, rows))
    return _best[key]


def measure_ms(attempt: Callable[[BlockConfig, int], None], config: BlockConfig, rows: int) -> float:
    """Return the mean milliseconds of three attempts after a warm-up; inf if the GPU lacks memory for such blocks."""
    import triton

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        attempt(config, rows)
    except triton.OutOfResources:
        return float("inf")
    start.record()
    for _ in range(3):
        attempt(config, rows)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 3
