"""Starts the kernels on tensors, with block sizes that are chosen on the GPU by time, once for each kind of input.

In Triton's interpreter the block sizes are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from eaopd_megatron.objective.triton_kernels import INTERPRETED, NOWHERE, gradient_kernel, sums_kernel

SUMS_ROWS = 4096  # rows on which block sizes are compared, at most
GRADIENT_ROWS = 512  # in new memory
FEW_ROWS = 256  # too few to compare on


@dataclass(frozen=True)
class Blocks:
    """A step of a program, ``depth`` runs of ``lanes`` columns, and how the kernel is compiled."""

    depth: int
    lanes: int
    warps: int
    stages: int


# With 16-bit logits a warp reads 256 columns at once, so that no sum of a run leaves its thread.
SUMS = (
    Blocks(2, 2048, 8, 2),
    Blocks(2, 2048, 8, 3),
    Blocks(4, 2048, 8, 2),
    Blocks(2, 1024, 4, 3),
    Blocks(4, 1024, 4, 2),
    Blocks(4, 1024, 4, 3),
    Blocks(4, 512, 2, 3),
    Blocks(4, 256, 1, 3),
)
GRADIENT = (
    Blocks(1, 4096, 8, 2),
    Blocks(1, 2048, 4, 2),
    Blocks(1, 2048, 8, 3),
    Blocks(1, 4096, 4, 2),
    Blocks(1, 8192, 8, 1),
    Blocks(1, 1024, 4, 3),
)
IN_THE_INTERPRETER = Blocks(2, 16, 4, 1)


def fill_sums(
    rows: Mapping[str, Tensor],
    student: Tensor,
    teacher: Tensor | None,
    valid: int,
    leave_out: tuple[Tensor, Tensor] | None,
    careful: bool,
) -> None:
    """Fill the rows of `vocab_parallel.partial_sums`, fp32 and named as there, from at least one valid column.

    student, teacher: [n, columns]; leave_out: (columns, held) [n, k].
    """
    n = student.shape[0]
    if n == 0:
        return
    unused = rows["student"]
    left_out = unused if leave_out is None else _ascending(*leave_out)[0]
    other = student if teacher is None else teacher
    arguments = (
        *(student, other, rows["student"], rows.get("teacher", unused), rows.get("gap", unused)),
        *(rows.get("student_rest", unused), rows.get("teacher_rest", unused), left_out),
        *(student.stride(0), other.stride(0), left_out.stride(0), n, valid),
    )
    flags = {"PAIR": teacher is not None, "REST": leave_out is not None, "CAREFUL": careful}
    kind = ("sums", *flags.values(), student.dtype, other.dtype, student.device)

    def attempt(blocks: Blocks, count: int) -> None:
        _start(sums_kernel, arguments, flags, blocks, count, student.device)

    attempt(chosen(SUMS, kind, valid, min(n, SUMS_ROWS), attempt), n)


@dataclass(frozen=True)
class Numbers:
    """What multiplies and adds in the gradient, upstream's factor and 1 / Z included: fp32 [n] unless said."""

    student_maximum: Tensor
    kappa: Tensor
    ratio: Tensor | None
    teacher_maximum: Tensor | None
    on_teacher: Tensor | None
    token: tuple[Tensor, Tensor] | None  # column, addition; 0 where another rank holds the token
    kept: tuple[Tensor, Tensor, Tensor] | None  # columns of S, held, additions [n, k]
    kappa_inside: Tensor | None


def fill_gradient(
    numbers: Numbers,
    student: Tensor,
    teacher: Tensor | None,
    teacher_rows: Tensor | None,
    valid: int,
    careful: bool,
    out: Tensor,
) -> None:
    """Write the gradient into the valid columns, at least one, of ``out`` [n, columns], which may be ``student``.

    teacher: its logits, where ratio or on_teacher is given; teacher_rows: the rows that they are of, None for all n.
    """
    if teacher_rows is None:
        _fill_gradient(numbers, student, teacher, None, valid, careful, out)
        return
    others = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    others[teacher_rows] = False
    without = replace(numbers, on_teacher=None)
    _fill_gradient(numbers, student, teacher, teacher_rows, valid, careful, out)
    _fill_gradient(without, student, None, others.nonzero()[:, 0], valid, careful, out)


def _fill_gradient(
    numbers: Numbers,
    student: Tensor,
    teacher: Tensor | None,
    rows: Tensor | None,
    valid: int,
    careful: bool,
    out: Tensor,
) -> None:
    n = student.shape[0]
    programs = n if rows is None else len(rows)
    if programs == 0:
        return
    zero = torch.zeros_like(numbers.kappa)
    given = (
        *(numbers.student_maximum, numbers.kappa, numbers.ratio, numbers.teacher_maximum, numbers.on_teacher),
        *(numbers.kappa_inside, None if numbers.token is None else numbers.token[1]),
    )
    factors = torch.stack([zero if value is None else value for value in given])
    tokens, kept, additions = zero, zero, zero
    if numbers.token is not None:
        tokens = numbers.token[0].int()
    if numbers.kept is not None:
        kept, order = _ascending(*numbers.kept[:2])
        additions = torch.nn.functional.pad(numbers.kept[2].gather(1, order), (0, 1))
    other = student if teacher is None else teacher
    flags = {
        "RATIO": numbers.ratio is not None,
        "TEACHER": numbers.on_teacher is not None,
        "TOKEN": numbers.token is not None,
        "KEPT": numbers.kept is not None,
        "INSIDE": numbers.kappa_inside is not None,
        "CAREFUL": careful,
    }
    kind = ("gradient", *flags.values(), student.dtype, other.dtype, out.dtype, student.device)

    def write(blocks: Blocks, count: int, some: Tensor | None, target: Tensor) -> None:
        arguments = (
            *(student, other, target, factors, zero if some is None else some, tokens, kept, additions),
            *(student.stride(0), other.stride(0), target.stride(0), kept.stride(0), n, valid),
        )
        _start(gradient_kernel, arguments, {"SOME": some is not None, **flags}, blocks, count, student.device)

    def attempt(blocks: Blocks, count: int) -> None:  # elsewhere: out may still hold the logits
        write(blocks, count, None, torch.empty(count, out.stride(0), dtype=out.dtype, device=out.device))

    write(chosen(GRADIENT, kind, valid, min(programs, GRADIENT_ROWS), attempt), programs, rows, out)


def _ascending(columns: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each row in order, [n, k + 1], those not held and the last one NOWHERE; and the order [n, k]."""
    values, order = torch.where(held, columns, NOWHERE).int().sort(1)
    return torch.nn.functional.pad(values, (0, 1), value=NOWHERE), order


def _start(
    kernel: triton.JITFunction,
    arguments: tuple[Tensor | int, ...],
    flags: Mapping[str, bool],
    blocks: Blocks,
    rows: int,
    device: torch.device,
) -> None:
    shape = {"DEPTH": blocks.depth, "LANES": blocks.lanes, "STAGES": blocks.stages, "num_warps": blocks.warps}
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[(rows,)](*arguments, **flags, **shape)


_best: dict[Hashable, Blocks] = {}


def chosen(
    candidates: tuple[Blocks, ...],
    kind: tuple[Hashable, ...],
    valid: int,
    rows: int,
    attempt: Callable[[Blocks, int], None],
) -> Blocks:
    """The candidate with which ``attempt(candidate, rows)`` is fastest for inputs of this kind and about this size.

    Other blocks add in another order: where torch is asked for deterministic algorithms, the first one is taken.
    """
    if INTERPRETED:
        return IN_THE_INTERPRETER
    if rows < FEW_ROWS or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    key = (*kind, valid.bit_length(), rows.bit_length())
    if key not in _best:
        _best[key] = min(candidates, key=lambda blocks: milliseconds(attempt, blocks, rows))
    return _best[key]


def milliseconds(attempt: Callable[[Blocks, int], None], blocks: Blocks, rows: int) -> float:
    """Mean time of three attempts after a first one; infinite where the GPU lacks the memory for such blocks."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        attempt(blocks, rows)
    except triton.OutOfResources:
        return float("inf")
    start.record()
    for _ in range(3):
        attempt(blocks, rows)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 3
