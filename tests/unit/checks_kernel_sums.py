"""Checks of the kernel that sums logits, in Triton's interpreter; `test_objective_kernels.py` runs them.

The interpreter is chosen by an environment variable before Triton is imported, so they run in their own process.
"""

from __future__ import annotations

import math
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import Objective, token_statistics
from eaopd_megatron.objective import triton_launch as launch
from eaopd_megatron.objective.triton_launch import force_kernels, uses_kernels
from eaopd_megatron.objective.vocab_parallel import merge_gap, merge_softmax, partial_sums
from tests.unit.kernel_cases import (
    DTYPES,
    STEP,
    assert_same_sums,
    both_sums,
    loss_of,
    normal,
    shard_of,
    with_kernels,
)


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
            for exclude in (None, (columns, held)):
                got, want, has_neg_inf = both_sums(student, other, shard, exclude)
                assert not has_neg_inf
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
    exclude = (columns, torch.ones_like(columns, dtype=torch.bool))
    for other in (None, teacher):
        got, want, has_neg_inf = both_sums(student, other, shard_of(width, width), exclude)
        assert has_neg_inf
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-4)


def check_a_row_at_the_lowest_number(group: ProcessGroup) -> None:
    """Such a maximum is also that of no columns at all."""
    student = torch.full((2, STEP + 3), torch.finfo(torch.float32).min)
    student[1] = normal(STEP + 3)
    got, want, has_neg_inf = both_sums(student, None, shard_of(STEP + 3, STEP + 3))
    assert not has_neg_inf and got["student"][1, 0] == STEP + 3
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
        broken = merge_softmax(got["student"][None])[0].has_nan_or_inf
        assert (
            broken.tolist() == [True] * 5 + [False] == merge_softmax(want["student"][None])[0].has_nan_or_inf.tolist()
        )
    with with_kernels():
        for name in ("student_logits", "teacher.logits"):
            sides = (student, teacher) if name == "student_logits" else (teacher, student)
            try:
                loss_of(sides[0], sides[1], Objective.preset("rkl"))
            except ValueError as error:
                assert str(error) == f"{name}: row 0 holds NaN or +inf, or nothing but -inf"
            else:
                raise AssertionError("broken logits went through")


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
                with force_kernels(True):
                    parts.append(partial_sums(student[:, columns], teacher[:, columns], shard, dtype=torch.float32)[0])
            rows = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
            s, alpha_s, delta_s = merge_softmax(rows["student"])
            t, _, delta_t = merge_softmax(rows["teacher"])
            gap = merge_gap(rows["gap"][:, 0], rows["student"][:, 1], alpha_s, delta_s - delta_t)
            merged.append(torch.stack([s.max_logit, s.sum_exp, s.sum_exp_x_shifted, t.sum_exp, gap]))
        torch.testing.assert_close(merged[1], merged[0], rtol=2e-6, atol=2e-5)


def check_any_number_of_tokens(group: ProcessGroup) -> None:
    """Programs share nothing: a row has the same bits alone and among others; no rows are no work."""
    student, teacher = normal(2, 5, STEP + 9).bfloat16().unbind()
    shard = shard_of(STEP + 9, STEP + 9)
    with with_kernels():
        whole, _ = partial_sums(student, teacher, shard, dtype=torch.float32)
        alone, _ = partial_sums(student[3:4], teacher[3:4], shard, dtype=torch.float32)
    with force_kernels(True), mock.patch.object(launch, "_start", side_effect=AssertionError("work on no rows")):
        nothing, _ = partial_sums(student[:0], teacher[:0], shard, dtype=torch.float32)
        empty = student[:0].clone().requires_grad_()
        loss_of(empty, teacher[:0], Objective.preset("eopd_exact")).loss.sum().backward()
    assert all(torch.equal(alone[name][:, 0], whole[name][:, 3]) for name in whole)
    assert [value.shape for value in nothing.values()] == [(3, 0), (3, 0), (2, 0)]
    assert empty.grad is not None and empty.grad.shape == empty.shape


def check_what_the_kernels_leave_to_torch(group: ProcessGroup) -> None:
    """fp64, and logits whose columns lie apart; and on a CPU everything, unless a test asks."""
    logits = normal(3, 40)
    assert not uses_kernels(logits)
    with force_kernels(True):
        assert uses_kernels(logits, None, logits.bfloat16())
        assert not uses_kernels(logits, logits.double()) and not uses_kernels(logits.T)
        assert uses_kernels(logits.T[:, :1])  # a single column lies apart from nothing
        assert uses_kernels(logits[:, 3:17])
        doubles = logits.double().requires_grad_()
        out = loss_of(doubles, logits, Objective.preset("rkl"))
        out.loss.sum().backward()
        assert out.loss.dtype == torch.float64 and doubles.grad is not None
        sampled = loss_of(logits.clone().requires_grad_(), logits.double(), Objective.preset("opd"))
        with mock.patch.object(launch, "_start", side_effect=AssertionError("numbers in fp64 over logits in fp32")):
            sampled.loss.sum().backward()
        with force_kernels(False):
            assert not uses_kernels(logits)


def check_statistics(group: ProcessGroup) -> None:
    logits = normal(5, 3 * STEP + 4).bfloat16()
    tokens = torch.tensor([0, 3 * STEP, 5, 7, STEP])
    with with_kernels():
        got = token_statistics(logits, tokens, vocab_size=3 * STEP + 1)
    log_q = logits[:, : 3 * STEP + 1].double().log_softmax(1)
    torch.testing.assert_close(got.logprob.double(), log_q.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.entropy.double(), -(log_q.exp() * log_q).sum(1), rtol=0, atol=1e-5)
    assert math.isfinite(got.entropy.sum().item())
