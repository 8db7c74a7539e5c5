"""Inputs of the kernel checks, and what runs them with Triton's kernels and with the torch code."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eaopd_megatron.objective import Objective, TeacherLogits, entropy_aware_loss
from eaopd_megatron.objective import triton_launch as launch
from eaopd_megatron.objective.entropy_aware import write_gradient
from eaopd_megatron.objective.triton_launch import force_kernels
from eaopd_megatron.objective.vocab_parallel import VocabShard, partial_sums
from tests.distributed.objective.cases import Case, run

STEP = launch.INTERPRETER_CONFIG.depth * launch.INTERPRETER_CONFIG.lanes
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VARIANTS = [
    ("topk", "sampled", "none"),
    ("topk", "sampled", "topk"),
    ("topk", "none", "topk_tail"),
    ("logits", "sampled", "exact"),
    ("logits", "exact", "none"),
    ("logits", "exact", "exact"),
    ("logits", "exact", "topk"),
    ("logits", "sampled", "topk_tail"),
    ("logits", "exact", "topk_tail"),
]
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton|numpy")  # inf - inf, by intent


@contextlib.contextmanager
def with_kernels() -> Iterator[list[str]]:
    """Kernels do the work inside, at least one of them; gives the names of those that were started."""
    started: list[str] = []
    start = launch._start

    def noted(kernel: Any, *arguments: Any) -> None:
        started.append(kernel.fn.__name__)
        start(kernel, *arguments)

    with force_kernels(True), mock.patch.object(launch, "_start", noted):
        yield started
    assert started, "the torch code did the work"


def where_they_are() -> Any:
    """Inside, the interpreter does not copy the memory of CPU tensors to itself."""
    from triton.runtime.interpreter import GridExecutor

    return mock.patch.object(GridExecutor, "_restore_args_dev", mock.Mock())


def shard_of(columns: int, vocab_size: int, rank: int = 0, ranks: int = 1) -> VocabShard:
    return VocabShard(columns, vocab_size, None, rank * columns, ranks)


def normal(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread + 2


def both_sums(
    student: Tensor, teacher: Tensor | None, shard: VocabShard, exclude: tuple[Tensor, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """The sums of the kernel and of the torch code, and whether the logits hold -inf."""
    with with_kernels():
        got, has_neg_inf = partial_sums(student, teacher, shard, dtype=torch.float32, exclude=exclude)
    want, also_careful = partial_sums(student, teacher, shard, dtype=torch.float32, exclude=exclude)
    assert has_neg_inf == also_careful
    assert list(got) == list(want), "ranks with and without kernels must pack the same rows"
    return got, want, has_neg_inf


def assert_same_sums(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-5)
        if name in ("student", "teacher"):
            assert torch.equal(got[name][0], want[name][0]), f"{name}: the maxima differ"


def loss_of(student: Tensor, teacher: Tensor, objective: Objective, **arguments: Any) -> Any:
    tokens = torch.zeros(len(student), dtype=torch.int64)
    size = student.shape[1]
    return entropy_aware_loss(
        student, TeacherLogits(teacher), tokens, None, objective=objective, vocab_size=size, **arguments
    )


def gradients(case: Case, objective: Objective, signal: str) -> tuple[Tensor, Tensor, tuple[Any, Any, Any]]:
    """The gradient by the kernel and by the torch code, and what it is made from: saved, student, teacher."""
    kept = {}
    apply = torch.Tensor.backward

    def keep(loss: Tensor, *arguments: Any) -> None:
        kept["saved"] = loss.grad_fn.saved  # type: ignore[union-attr]
        apply(loss, *arguments)

    with mock.patch.object(torch.Tensor, "backward", keep):
        _, want = run(case, objective, signal, None)
    out = torch.full_like(case.student, torch.nan)
    teacher = case.teacher if signal == "logits" else None
    if teacher is not None and kept["saved"].teacher_rows is not None:
        teacher = teacher[kept["saved"].teacher_rows]
    with with_kernels():
        write_gradient(kept["saved"], case.student, teacher, case.upstream, out)
    return out, want, (kept["saved"], case.student, teacher)


class Largest(TorchDispatchMode):
    """The largest new tensor that an operation makes inside, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = func.is_view or "detach" in str(func) or "set_" in str(func)  # the interpreter's are set_
        if isinstance(out, Tensor) and not known:
            self.elements = max(self.elements, out.numel())
        return out
