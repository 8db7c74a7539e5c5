"""Checks of the gradient kernel in Triton's interpreter; `test_objective_kernels.py` runs them.

The interpreter is chosen by an environment variable before Triton is imported, so they run in their own process.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import Objective, TeacherLogits, entropy_aware_loss
from eaopd_megatron.objective.entropy_aware import write_gradient
from eaopd_megatron.objective.triton_launch import force_kernels
from tests.distributed.objective.cases import TOP_K, compare, make_case
from tests.unit.kernel_cases import (
    DTYPES,
    STEP,
    VARIANTS,
    Largest,
    assert_same_sums,
    both_sums,
    gradients,
    loss_of,
    normal,
    shard_of,
    where_they_are,
    with_kernels,
)


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


def check_the_gradient_of_shards(group: ProcessGroup) -> None:
    """S, the sampled token and the valid columns end anywhere in a shard, or lie in none of it."""
    for signal, reverse, forward in VARIANTS:
        case = make_case(dtype=torch.float32, n=4, seed=2)
        assert case.student.shape[1] == 48
        objective = Objective(reverse_kl=reverse, forward_kl=forward, gate="always", top_k=TOP_K)  # type: ignore[arg-type]
        whole, want, (saved, student, teacher) = gradients(case, objective, signal)
        scale = want.abs().max().item()
        torch.testing.assert_close(whole, want, rtol=0, atol=2e-6 * scale)
        for ranks in (6,) if forward == "topk_tail" else (2,):
            width, valid = 48 // ranks, case.vocab_size - 3 * (ranks == 6)
            pieces = []
            for rank in range(ranks):
                columns = slice(rank * width, (rank + 1) * width)
                part = replace(saved, shard=shard_of(width, valid, rank, ranks))
                piece = torch.full_like(student[:, columns], torch.nan)
                other = None if teacher is None else teacher[:, columns]
                with force_kernels(True):
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
            with force_kernels(wanted):
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
        got, want, (saved, _, _) = gradients(case, objective, signal)
        assert saved.has_neg_inf
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert not got[4].any()


def check_the_teachers_logits_of_some_rows(group: ProcessGroup) -> None:
    """With a sampled reverse term they are kept for the rows of open gates alone, under other row numbers."""
    case = make_case(dtype=torch.bfloat16, n=12)
    for threshold in (case.threshold(), math.inf):
        objective = Objective(forward_kl="exact", threshold=threshold, top_k=TOP_K)
        got, want, (saved, _, teacher) = gradients(case, objective, "logits")
        assert saved.teacher_rows is not None and len(saved.teacher_rows) == len(teacher) < 12
        torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-6)


def check_the_gradient_over_the_logits(group: ProcessGroup, dtype: str) -> None:
    """Every column is read before it is written, the columns of S too; rounding to storage happens once."""
    for signal, reverse, forward in VARIANTS:
        case = make_case(dtype=DTYPES[dtype], n=6)
        objective = Objective(reverse_kl=reverse, forward_kl=forward, gate="always", top_k=TOP_K)  # type: ignore[arg-type]
        got, want, (saved, student, teacher) = gradients(case, objective, signal)
        over = student.clone()
        with with_kernels():
            write_gradient(saved, over, teacher, case.upstream, over)
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
        saved = gradients(case, Objective.preset("eopd_exact"), "logits")[2][0]
        saved = replace(saved, shard=shard)
        results = []
        for wanted in (False, True):
            over = student.clone(memory_format=torch.contiguous_format) if not wanted else student
            with force_kernels(wanted):
                write_gradient(saved, over, teacher, case.upstream, over)
            results.append(over.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(results[1], results[0], rtol=2.0**-7, atol=1e-6)


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
