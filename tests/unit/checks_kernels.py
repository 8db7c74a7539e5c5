"""What must hold of the kernels in Triton's interpreter; `test_objective_kernels.py` runs it in a process of its own.

The interpreter is chosen by an environment variable before Triton is imported.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from eaopd_megatron.objective import Objective, TeacherLogits, entropy_aware_loss, token_statistics
from eaopd_megatron.objective import triton_launch as launch
from eaopd_megatron.objective.backend import kernels_for, kernels_wanted
from eaopd_megatron.objective.gradient import write_gradient
from eaopd_megatron.objective.vocab_parallel import Shard, merge, merge_gap, partial_sums
from tests.distributed.objective.cases import TOP_K, Case, compare, make_case, run

STEP = launch.IN_THE_INTERPRETER.depth * launch.IN_THE_INTERPRETER.lanes
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

    with kernels_wanted(True), mock.patch.object(launch, "_start", noted):
        yield started
    assert started, "the torch code did the work"


def where_they_are() -> Any:
    """Inside, the interpreter does not copy the memory of CPU tensors to itself."""
    from triton.runtime.interpreter import GridExecutor

    return mock.patch.object(GridExecutor, "_restore_args_dev", mock.Mock())


def shard_of(columns: int, vocab_size: int, rank: int = 0, ranks: int = 1) -> Shard:
    return Shard(columns, vocab_size, None, rank * columns, ranks)


def normal(*shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread + 2


def both_sums(
    student: Tensor, teacher: Tensor | None, shard: Shard, leave_out: tuple[Tensor, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """The sums of the kernel and of the torch code, and whether the logits hold -inf."""
    with with_kernels():
        got, careful = partial_sums(student, teacher, shard, dtype=torch.float32, leave_out=leave_out)
    want, also_careful = partial_sums(student, teacher, shard, dtype=torch.float32, leave_out=leave_out)
    assert careful == also_careful
    assert list(got) == list(want), "ranks with and without kernels must pack the same rows"
    return got, want, careful


def assert_same_sums(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for name in want:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-5)
        if name in ("student", "teacher"):
            assert torch.equal(got[name][0], want[name][0]), f"{name}: the maxima differ"


def check_sums(group: ProcessGroup, dtype: str) -> None:
    """Widths around the step of a program, padding that is NaN, columns that are left out, rows with a stride."""
    for valid, padded in ((1, 1), (1, 9), (STEP - 1, STEP), (STEP, STEP + 3), (2 * STEP + 5, 2 * STEP + 16)):
        n, k = 2, min(4, valid)
        logits = normal(2, n, padded + 7, seed=valid).to(DTYPES[dtype])
        logits[:, :, valid:] = torch.nan
        student, teacher = logits[:, :, :padded].unbind()
        shard = shard_of(padded, valid)
        columns = torch.stack([torch.randperm(valid)[:k] for _ in range(n)])
        held = torch.arange(k).expand(n, k) % 3 != 1
        columns[:, 0] = valid - 1
        columns[0, 0] = min(STEP, valid - 1)  # the first of the second step
        columns[1, 1:] = torch.where(held[1, 1:], columns[1, 1:], valid - 1)  # what is not held collides
        distinct = [len(set(row[keep].tolist())) == int(keep.sum()) for row, keep in zip(columns, held, strict=True)]
        held &= torch.tensor(distinct)[:, None]
        for other in (None, teacher):
            for leave_out in (None, (columns, held)):
                got, want, careful = both_sums(student, other, shard, leave_out)
                assert not careful
                assert_same_sums(got, want)


def check_mixed_precision(group: ProcessGroup) -> None:
    student, teacher = normal(2, 3, 70).unbind()
    shard = shard_of(70, 70)
    got, want, _careful = both_sums(student, teacher.bfloat16(), shard)
    assert_same_sums(got, want)


def check_a_growing_maximum(group: ProcessGroup) -> None:
    """Every step finds a larger logit, of either side alone or of both; and the gap stays that of the last maxima."""
    rising = torch.linspace(-40, 40, 4 * STEP + 3)
    level = normal(len(rising), spread=1.0)
    rows = [
        (rising, rising.flip(0)),
        (rising, level),
        (level, rising),
        (rising * 5, rising * 5 + level),
        (level, level),
    ]
    student, teacher = (torch.stack(side) for side in zip(*rows, strict=True))
    got, want, _careful = both_sums(student, teacher, shard_of(len(rising), len(rising)))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-3)


def check_equal_rows(group: ProcessGroup) -> None:
    """Where student and teacher agree the divergences are 0, not rounding."""
    student = normal(4, 3 * STEP + 1).bfloat16()
    shard = shard_of(student.shape[1], student.shape[1])
    got, _want, _careful = both_sums(student, student.clone(), shard)
    assert not got["gap"].any() and torch.equal(got["student"], got["teacher"])


def check_small_divergences_keep_their_digits(group: ProcessGroup) -> None:
    """A KL of 1e-6 is a sum of gaps; as a difference of cross sums it would be rounding."""
    teacher = normal(6, 5 * STEP, spread=4.0) + 20
    student = teacher + 1e-3 * normal(6, 5 * STEP, seed=1, spread=1.0)
    got, _want, _careful = both_sums(student, teacher, shard_of(5 * STEP, 5 * STEP))
    s, t = student.double().log_softmax(1), teacher.double().log_softmax(1)
    total = got["student"][1] / got["teacher"][1]
    reverse = got["gap"][0] / got["student"][1] - total.log()
    torch.testing.assert_close(reverse.double(), (s.exp() * (s - t)).sum(1), rtol=0, atol=2e-7)


def check_minus_infinity(group: ProcessGroup) -> None:
    """0 · inf = 0; a divergence with p > 0 where q = 0 is infinite; a row of -inf alone has no sums."""
    width = 3 * STEP + 2
    student, teacher = normal(2, 8, width).unbind()
    low = torch.finfo(torch.float32).min
    teacher[1, ::3] = -torch.inf
    student[2, :STEP] = teacher[2, :STEP] = -torch.inf  # nothing in the first step
    student[3, :-1] = teacher[3, 1:] = -torch.inf  # one column each, at either end
    student[4] = -torch.inf
    student[5, :STEP] = low
    teacher[6, :STEP] = low
    student[0, :STEP], student[0, 0] = -200.0, -150.0  # below the row's maximum by more than fp32 can tell, and p = 0
    teacher[0, 0] = -torch.inf
    student[7] = low  # the lowest number, and so a row of equal logits
    columns = torch.tensor([[1, width - 1]]).expand(8, 2)
    leave_out = (columns, torch.ones_like(columns, dtype=torch.bool))
    for other in (None, teacher):
        got, want, careful = both_sums(student, other, shard_of(width, width), leave_out)
        assert careful
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-4)


def check_a_row_at_the_lowest_number(group: ProcessGroup) -> None:
    """Such a maximum is also that of no columns at all."""
    student = torch.full((2, STEP + 3), torch.finfo(torch.float32).min)
    student[1] = normal(STEP + 3)
    got, want, careful = both_sums(student, None, shard_of(STEP + 3, STEP + 3))
    assert not careful and got["student"][1, 0] == STEP + 3
    assert_same_sums(got, want)


def check_broken_rows(group: ProcessGroup) -> None:
    """NaN and +inf must stay visible: a maximum on a GPU leaves NaN out."""
    student, teacher = normal(2, 6, 2 * STEP + 5).unbind()
    student[0, 3] = torch.nan
    student[1, -1] = torch.inf
    student[2, :] = torch.nan
    student[3, 5], student[3, 6] = torch.inf, -torch.inf
    student[4] = -torch.inf
    shard = shard_of(student.shape[1], student.shape[1])
    for other in (None, teacher):
        got, want, _careful = both_sums(student, other, shard)
        broken = merge(got["student"][None])[0].broken
        assert broken.tolist() == [True] * 5 + [False] == merge(want["student"][None])[0].broken.tolist()
    with with_kernels():
        for name in ("student_logits", "teacher.logits"):
            sides = (student, teacher) if name == "student_logits" else (teacher, student)
            try:
                loss_of(sides[0], sides[1], Objective.preset("rkl"))
            except ValueError as error:
                assert str(error) == f"{name}: row 0 holds NaN or +inf, or nothing but -inf"
            else:
                raise AssertionError("broken logits went through")


def loss_of(student: Tensor, teacher: Tensor, objective: Objective, **arguments: Any) -> Any:
    tokens = torch.zeros(len(student), dtype=torch.int64)
    size = student.shape[1]
    return entropy_aware_loss(
        student, TeacherLogits(teacher), tokens, None, objective=objective, vocab_size=size, **arguments
    )


def check_shards_merge_to_the_whole(group: ProcessGroup) -> None:
    """Two shards, the second with and without valid columns, give the sums of the whole."""
    student, teacher = normal(2, 5, 2 * STEP).unbind()
    for vocab_size in (2 * STEP - 9, STEP):
        merged = []
        for ranks in (1, 2):
            width = 2 * STEP // ranks
            parts: list[dict[str, Tensor]] = []
            for rank in range(ranks):
                shard = shard_of(width, vocab_size, rank, ranks)
                columns = slice(rank * width, (rank + 1) * width)
                with kernels_wanted(True):
                    parts.append(partial_sums(student[:, columns], teacher[:, columns], shard, dtype=torch.float32)[0])
            rows = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
            s, alpha_s, delta_s = merge(rows["student"])
            t, _, delta_t = merge(rows["teacher"])
            gap = merge_gap(rows["gap"][:, 0], rows["student"][:, 1], alpha_s, delta_s - delta_t)
            merged.append(torch.stack([s.maximum, s.total, s.weighted, t.total, gap]))
        torch.testing.assert_close(merged[1], merged[0], rtol=2e-6, atol=2e-5)


def check_any_number_of_tokens(group: ProcessGroup) -> None:
    """Programs share nothing: a row has the same bits alone and among others; no rows are no work."""
    student, teacher = normal(2, 5, STEP + 9).bfloat16().unbind()
    shard = shard_of(STEP + 9, STEP + 9)
    with with_kernels():
        whole, _ = partial_sums(student, teacher, shard, dtype=torch.float32)
        alone, _ = partial_sums(student[3:4], teacher[3:4], shard, dtype=torch.float32)
    with kernels_wanted(True), mock.patch.object(launch, "_start", side_effect=AssertionError("work on no rows")):
        nothing, _ = partial_sums(student[:0], teacher[:0], shard, dtype=torch.float32)
        empty = student[:0].clone().requires_grad_()
        loss_of(empty, teacher[:0], Objective.preset("eopd_exact")).loss.sum().backward()
    assert all(torch.equal(alone[name][:, 0], whole[name][:, 3]) for name in whole)
    assert [value.shape for value in nothing.values()] == [(3, 0), (3, 0), (2, 0)]
    assert empty.grad is not None and empty.grad.shape == empty.shape


def check_variants(group: ProcessGroup, dtype: str) -> None:
    """Values and gradient of the public call against the dense fp64 oracle, and both kernels at work."""
    for index, (signal, reverse, forward) in enumerate(VARIANTS):
        layout = ("padded", "even")[index % 2]
        case = make_case(dtype=DTYPES[dtype], layout=layout, n=8, seed=index)
        case = replace(case, upstream=torch.where(torch.arange(8) == 4, 0.0, case.upstream))
        objective = Objective(
            reverse_kl=reverse,  # type: ignore[arg-type]
            forward_kl=forward,  # type: ignore[arg-type]
            gate=("hard", "soft", "always")[index % 3],  # type: ignore[arg-type]
            threshold=case.threshold(),
            reverse_weight=0.7,
            forward_weight=1.3,
            top_k=TOP_K,
        )
        with with_kernels() as started:
            compare(case, objective, signal, None, old=index % 2 == 0)
        assert set(started) == {"sums_kernel", "gradient_kernel"}


def gradients(case: Case, objective: Objective, signal: str) -> tuple[Tensor, Tensor, tuple[Any, Any, Any]]:
    """The gradient by the kernel and by the torch code, and what it is made from: recipe, student, teacher."""
    kept = {}
    apply = torch.Tensor.backward

    def keep(loss: Tensor, *arguments: Any) -> None:
        kept["recipe"] = loss.grad_fn.recipe  # type: ignore[union-attr]
        apply(loss, *arguments)

    with mock.patch.object(torch.Tensor, "backward", keep):
        _, want = run(case, objective, signal, None)
    out = torch.full_like(case.student, torch.nan)
    teacher = case.teacher if signal == "logits" else None
    if teacher is not None and kept["recipe"].teacher_rows is not None:
        teacher = teacher[kept["recipe"].teacher_rows]
    with with_kernels():
        write_gradient(kept["recipe"], case.student, teacher, case.upstream, out)
    return out, want, (kept["recipe"], case.student, teacher)


def check_the_gradient_of_shards(group: ProcessGroup) -> None:
    """S, the sampled token and the valid columns end anywhere in a shard, or lie in none of it."""
    for signal, reverse, forward in VARIANTS:
        case = make_case(dtype=torch.float32, n=4, seed=2)
        assert case.student.shape[1] == 48
        objective = Objective(reverse_kl=reverse, forward_kl=forward, gate="always", top_k=TOP_K)  # type: ignore[arg-type]
        whole, want, (recipe, student, teacher) = gradients(case, objective, signal)
        scale = want.abs().max().item()
        torch.testing.assert_close(whole, want, rtol=0, atol=2e-6 * scale)
        for ranks in (6,) if forward == "topk_tail" else (2,):
            width, valid = 48 // ranks, case.vocab_size - 3 * (ranks == 6)
            pieces = []
            for rank in range(ranks):
                columns = slice(rank * width, (rank + 1) * width)
                part = replace(recipe, shard=shard_of(width, valid, rank, ranks))
                piece = torch.full_like(student[:, columns], torch.nan)
                other = None if teacher is None else teacher[:, columns]
                with kernels_wanted(True):
                    write_gradient(part, student[:, columns], other, case.upstream, piece)
                pieces.append(piece)
            joined = torch.cat(pieces, dim=1)
            torch.testing.assert_close(joined[:, :valid], whole[:, :valid], rtol=1e-6, atol=1e-7 * scale)
            assert not joined[:, valid:].any()


def check_the_gradient_of_wide_rows(group: ProcessGroup) -> None:
    """S and the sampled tokens at both edges of a program's steps."""
    width = 3 * STEP + 5
    student, teacher = normal(2, 4, width).unbind()
    edges = torch.tensor([0, STEP - 1, STEP, 2 * STEP - 1, 2 * STEP, 3 * STEP, width - 1])
    teacher[:, edges] = 20 + torch.rand(4, len(edges))
    tokens = edges[[1, 2, 4, 6]]
    for reverse, forward in (("sampled", "topk"), ("sampled", "topk_tail"), ("exact", "topk_tail"), ("exact", "exact")):
        objective = Objective(reverse_kl=reverse, forward_kl=forward, gate="always", top_k=7)  # type: ignore[arg-type]
        grads = []
        for wanted in (True, False):
            leaf = student.clone().requires_grad_()
            with kernels_wanted(wanted):
                out = entropy_aware_loss(
                    leaf, TeacherLogits(teacher), tokens, None, objective=objective, vocab_size=width
                )
                out.loss.sum().backward()
            assert leaf.grad is not None
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=2e-6 * grads[1].abs().max().item())


def check_the_gradient_where_the_sums_need_care(group: ProcessGroup) -> None:
    """Logits of -inf in either side, a closed row whose loss is infinite, S larger than the support."""
    for signal, reverse, forward in VARIANTS:
        case = make_case(layout="even", dtype=torch.float32, n=8)
        case.tokens.clamp_(min=3)
        case.teacher_tokens[:] = case.tokens
        case.student[:, :3] = -torch.inf
        if signal == "logits":
            case.teacher[:, :3] = -torch.inf
            case.student[1, 10:] = case.teacher[1, 10:] = -torch.inf
            case.tokens[1] = case.teacher_tokens[1] = 5
            case.teacher[4, 6] = -torch.inf
            case.tokens[4] = case.teacher_tokens[4] = 6  # upstream is 0 there
        objective = Objective(reverse_kl=reverse, forward_kl=forward, gate="always", top_k=TOP_K)  # type: ignore[arg-type]
        got, want, (recipe, _, _) = gradients(case, objective, signal)
        assert recipe.careful
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert not got[4].any()


def check_the_teachers_logits_of_some_rows(group: ProcessGroup) -> None:
    """With a sampled reverse term they are kept for the rows of open gates alone, under other row numbers."""
    case = make_case(dtype=torch.bfloat16, n=12)
    for threshold in (case.threshold(), math.inf):
        objective = Objective(forward_kl="exact", threshold=threshold, top_k=TOP_K)
        got, want, (recipe, _, teacher) = gradients(case, objective, "logits")
        assert recipe.teacher_rows is not None and len(recipe.teacher_rows) == len(teacher) < 12
        torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-6)


def check_the_gradient_over_the_logits(group: ProcessGroup, dtype: str) -> None:
    """Every column is read before it is written, the columns of S too; rounding to storage happens once."""
    for signal, reverse, forward in VARIANTS:
        case = make_case(dtype=DTYPES[dtype], n=6)
        objective = Objective(reverse_kl=reverse, forward_kl=forward, gate="always", top_k=TOP_K)  # type: ignore[arg-type]
        got, want, (recipe, student, teacher) = gradients(case, objective, signal)
        over = student.clone()
        with with_kernels():
            write_gradient(recipe, over, teacher, case.upstream, over)
        assert torch.equal(over, got)
        torch.testing.assert_close(got, want, rtol=2.0**-7 if dtype == "bf16" else 1e-5, atol=1e-6)


def check_a_sure_token_keeps_its_gradient(group: ProcessGroup) -> None:
    """At q(y) = 0.9995 the gradient c (q - 1) is lost where c q is rounded to bf16 before c is subtracted."""
    student = torch.zeros(1, STEP, dtype=torch.bfloat16)
    student[0, 0] = 12.0
    leaf = student.clone().requires_grad_()
    with with_kernels():
        out = loss_of(leaf, normal(1, STEP).bfloat16(), Objective.preset("opd"))
        out.loss.sum().backward()
    assert leaf.grad is not None
    c = (out.teacher_logprob - out.student_logprob).item()
    q = student.double().softmax(1)[0]
    want = c * (q - torch.eye(STEP, dtype=torch.float64)[0])
    torch.testing.assert_close(leaf.grad[0].double(), want, rtol=2.0**-7, atol=0)


def check_offsets_beyond_32_bits(group: ProcessGroup) -> None:
    """A micro-batch of 16 k tokens over 151,936 columns has 2.5e9 logits."""
    stride = 2**30 + 8
    # Memory that nothing touches costs nothing.
    memory = torch.empty(2, 2 * stride + 64, dtype=torch.bfloat16)
    student, teacher = (side.as_strided((3, 40), (stride, 1), side.storage_offset()) for side in memory)
    student.copy_(normal(3, 40)), teacher.copy_(normal(3, 40, seed=1))
    shard = shard_of(40, 37)
    with where_they_are():
        got, want, _careful = both_sums(student, teacher, shard)
        assert_same_sums(got, want)
        case = make_case(dtype=torch.float32, n=3)
        recipe = gradients(case, Objective.preset("eopd_exact"), "logits")[2][0]
        recipe = replace(recipe, shard=shard)
        results = []
        for wanted in (False, True):
            over = student.clone(memory_format=torch.contiguous_format) if not wanted else student
            with kernels_wanted(wanted):
                write_gradient(recipe, over, teacher, case.upstream, over)
            results.append(over.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(results[1], results[0], rtol=2.0**-7, atol=1e-6)


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


def check_no_buffer_grows_with_the_vocabulary(group: ProcessGroup) -> None:
    """What the kernels save: the torch code fills buffers of a chunk of tokens times the vocabulary."""
    student, teacher = normal(2, 4, 400).bfloat16().unbind()
    leaf = student.clone().requires_grad_()
    with with_kernels(), where_they_are():
        with Largest() as forward:
            out = loss_of(leaf, teacher, Objective.preset("eopd_exact"))
        with Largest() as backward:
            (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    assert forward.elements <= 4 * 10, forward.elements
    assert backward.elements == gradient.numel(), backward.elements


def check_what_the_kernels_leave_to_torch(group: ProcessGroup) -> None:
    """fp64, and logits whose columns lie apart; and on a CPU everything, unless a test asks."""
    logits = normal(3, 40)
    assert kernels_for(logits) is None
    with kernels_wanted(True):
        assert kernels_for(logits, None, logits.bfloat16()) is launch
        assert kernels_for(logits, logits.double()) is None and kernels_for(logits.T) is None
        assert kernels_for(logits.T[:, :1]) is launch  # a single column lies apart from nothing
        assert kernels_for(logits[:, 3:17]) is launch
        doubles = logits.double().requires_grad_()
        out = loss_of(doubles, logits, Objective.preset("rkl"))
        out.loss.sum().backward()
        assert out.loss.dtype == torch.float64 and doubles.grad is not None
        sampled = loss_of(logits.clone().requires_grad_(), logits.double(), Objective.preset("opd"))
        with mock.patch.object(launch, "_start", side_effect=AssertionError("numbers in fp64 over logits in fp32")):
            sampled.loss.sum().backward()
        with kernels_wanted(False):
            assert kernels_for(logits) is None


def check_statistics(group: ProcessGroup) -> None:
    logits = normal(5, 3 * STEP + 4).bfloat16()
    tokens = torch.tensor([0, 3 * STEP, 5, 7, STEP])
    with with_kernels():
        got = token_statistics(logits, tokens, vocab_size=3 * STEP + 1)
    log_q = logits[:, : 3 * STEP + 1].double().log_softmax(1)
    torch.testing.assert_close(got.logprob.double(), log_q.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), -(log_q.exp() * log_q).sum(1), rtol=0, atol=1e-5)
    assert math.isfinite(got.entropy.sum().item())
