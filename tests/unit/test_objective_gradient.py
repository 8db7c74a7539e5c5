"""Values, gradients and properties of the objective on one rank."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eaopd_megatron.objective import (
    Objective,
    TeacherLogits,
    entropy_aware_loss,
    summarise_teacher,
    token_statistics,
)
from tests.distributed.objective.cases import TOP_K, compare, make_case, run
from tests.unit.objective_variants import variants

SIGNALS = ("logits", "topk")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("preset", ["opd", "eopd"])
@pytest.mark.parametrize("layout", ["even", "padded"])
@pytest.mark.parametrize("old", [True, False])
def test_presets_against_the_oracle(preset: str, signal: str, dtype: torch.dtype, layout: str, old: bool) -> None:
    case = make_case(dtype=dtype, layout=layout)
    objective = Objective.preset(preset, top_k=TOP_K, threshold=case.threshold())
    want = compare(case, objective, signal, None, old=old)
    assert 0 < want.gate.sum() < len(want.gate)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_variant_on_any_shape_against_the_oracle(data: st.DataObject) -> None:
    signal = data.draw(st.sampled_from(SIGNALS))
    variant = data.draw(variants(full=signal == "logits"))
    case = make_case(**variant.case)
    compare(case, replace(variant.objective, threshold=case.threshold()), signal, None, **variant.call)


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_reverse_term_without_weight_leaves_the_forward_one_alone(signal: str) -> None:
    case = make_case()
    objective = Objective(reverse_weight=0.0, threshold=case.threshold(), top_k=TOP_K)
    want = compare(case, objective, signal, None)
    assert torch.equal(want.loss, want.gate * want.forward_kl) and want.clipped.any()


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_vocabulary_smaller_than_top_k(signal: str) -> None:
    """S is the whole vocabulary: nothing is left for the tail's bucket, whatever rounding says."""
    generator = torch.Generator().manual_seed(0)
    student, logits = torch.randn(2, 9, 7, generator=generator).unbind()
    tokens = torch.randint(0, 7, (9,), generator=generator)
    teacher: Any = TeacherLogits(logits)
    if signal == "topk":
        teacher = summarise_teacher(logits, tokens, k=16, vocab_size=7)
        assert teacher.ids.shape == (9, 7)
    student.requires_grad_()
    grads = {}
    for forward in ("topk", "topk_tail"):
        objective = Objective(reverse_kl="none", forward_kl=forward, gate="always")  # type: ignore[arg-type]
        out = entropy_aware_loss(student, teacher, tokens, None, objective=objective, vocab_size=7)
        (grads[forward],) = torch.autograd.grad(out.loss.sum(), student)
    want = student.detach().softmax(1) - logits.softmax(1)
    for grad in grads.values():
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("signal", SIGNALS)
def test_no_forward_weight_is_opd_to_the_bit(signal: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(dtype=dtype)
        opd, gradient = run(case, Objective.preset("opd", top_k=TOP_K), signal, None)
        for forward in ("topk", "topk_tail", "none"):
            objective = Objective(forward_kl=forward, forward_weight=0.0, top_k=TOP_K)  # type: ignore[arg-type]
            out, other = run(case, objective, signal, None)
            assert torch.equal(out.loss, opd.loss) and torch.equal(other, gradient)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_an_infinite_threshold_is_opd_and_a_negative_one_is_forward_kl_everywhere(signal: str, gate: Any) -> None:
    case = make_case(dtype=torch.float32)
    opd, gradient = run(case, Objective.preset("opd", top_k=TOP_K), signal, None)
    out, other = run(case, Objective(threshold=math.inf, gate=gate, top_k=TOP_K), signal, None)
    assert torch.equal(out.loss, opd.loss) and torch.equal(other, gradient) and not out.gate.any()
    everywhere, all_gradient = run(case, Objective(gate="always", top_k=TOP_K), signal, None)
    out, other = run(case, Objective(threshold=-math.inf, gate=gate, top_k=TOP_K), signal, None)
    assert torch.equal(out.loss, everywhere.loss) and torch.equal(other, all_gradient) and out.gate.all()
    assert torch.equal(out.loss, opd.loss + out.forward_kl)


@pytest.mark.parametrize("forward", ["topk", "topk_tail", "exact"])
def test_where_the_gradient_vanishes(forward: Any) -> None:
    """The teacher is a stationary point of the exact forward KL, and of the one with a bucket for the tail.

    It is none of the paper's top-k term: q is normalised over the vocabulary and the target over S alone, so that the
    term is KL(p~ || q) with a target of no probability outside S. At q = p its gradient is p_j - p~_j in S and p_j
    outside: it goes on pulling the tail's mass into S. The minimum puts all mass on S.
    """
    case = make_case()
    teacher = case.teacher[:, : case.vocab_size]
    student = teacher.clone().requires_grad_()
    objective = Objective(reverse_kl="none", forward_kl=forward, gate="always", top_k=TOP_K)
    out = entropy_aware_loss(
        student, TeacherLogits(teacher), case.tokens, None, objective=objective, vocab_size=case.vocab_size
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), student)
    if forward != "topk":
        assert gradient.abs().max() < 1e-12 and out.forward_kl.abs().max() < 1e-12
        return
    p = teacher.softmax(1)
    ids = teacher.topk(TOP_K, dim=1).indices
    outside = torch.ones_like(p).scatter_(1, ids, 0)
    torch.testing.assert_close(gradient * outside, p * outside)
    mass = (p * (1 - outside)).sum(1)
    assert (gradient * (1 - outside)).sum(1).max() < 0 and torch.allclose(out.forward_kl, -mass.log())


def test_no_divergence_is_below_rounding() -> None:
    """A KL is not clamped, so a sign error would show; fp32 may leave it at -1e-5."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-4, 1e-2, 1.0, 30.0):
        teacher = torch.randn(50, 5000, generator=generator) * 4 + 20
        student = teacher + scale * torch.randn(50, 5000, generator=generator)
        for forward in ("topk_tail", "exact", "topk"):
            out = entropy_aware_loss(
                student,
                TeacherLogits(teacher),
                torch.zeros(50, dtype=torch.int64),
                None,
                objective=Objective(reverse_kl="exact", forward_kl=forward),  # type: ignore[arg-type]
                vocab_size=5000,
            )
            for value in (out.forward_kl, out.reverse_kl):
                assert value.isfinite().all() and value.min() >= -1e-5
            assert out.teacher_entropy.min() >= -1e-5 and out.student_entropy.min() >= -1e-5


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_change_no_bit_of_wide_rows(signal: str, threads: int) -> None:
    """Torch sums a single wide row with several threads in another order than two rows."""
    generator = torch.Generator().manual_seed(0)
    student, logits = (torch.randn(2, 5, 70_001, generator=generator) * 3).bfloat16().unbind()
    tokens = torch.tensor([0, 7, 69_000, 1, 2])
    teacher: Any = TeacherLogits(logits)
    if signal == "topk":
        teacher = summarise_teacher(logits, tokens, k=16, vocab_size=70_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        results: list[list[Tensor]] = []
        for chunk in (1, 2, 3, 4, 5, None):
            leaf = student.clone().requires_grad_()
            out = entropy_aware_loss(leaf, teacher, tokens, None, objective=Objective(), vocab_size=70_000, chunk=chunk)
            out.loss.sum().backward()
            assert leaf.grad is not None
            logprobs = token_statistics(student, tokens, vocab_size=70_000, chunk=chunk).logprob
            results.append([leaf.grad, logprobs, *(value.detach() for value in vars(out).values())])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("signal", SIGNALS)
def test_no_tokens_give_a_loss_with_a_graph(signal: str) -> None:
    """An empty micro-batch must go through backward like any other, or its rank leaves the others waiting."""
    case = make_case(dtype=torch.float32)
    student = case.student[:0].clone().requires_grad_()
    teacher: Any = TeacherLogits(case.teacher[:0])
    if signal == "topk":
        teacher = summarise_teacher(case.teacher[:0], case.tokens[:0], k=4, vocab_size=case.vocab_size)
    for preset in ("opd", "eopd"):
        out = entropy_aware_loss(
            student,
            teacher,
            case.tokens[:0],
            None,
            objective=Objective.preset(preset, top_k=4),
            vocab_size=case.vocab_size,
        )
        assert out.loss.shape == (0,) and out.loss.grad_fn is not None
        out.loss.sum().backward()
        assert student.grad is not None and student.grad.shape == student.shape


def test_a_token_without_weight_adds_nothing_even_where_its_loss_is_infinite() -> None:
    """0 · inf = 0: a masked row whose teacher gives the token no probability must not spoil the gradient."""
    case = make_case(layout="even", dtype=torch.float32)
    case.teacher[4, :] = -torch.inf
    case.teacher[4, 1] = 0.0
    case.tokens[4] = case.teacher_tokens[4] = 2
    assert case.upstream[4] == 0
    for objective in (Objective(top_k=TOP_K), Objective(forward_kl="exact"), Objective.preset("opd")):
        out, gradient = run(case, objective, "logits", None)
        assert out.loss[4].isinf() and gradient.isfinite().all() and not gradient[4].any()


def test_a_closed_gate_hides_an_infinite_divergence() -> None:
    case = make_case(layout="even", dtype=torch.float32)
    case.student[:, :3] = -torch.inf
    case.tokens.clamp_(min=3)
    case.teacher_tokens[:] = case.tokens
    objective = Objective(forward_kl="exact", threshold=math.inf)
    out, gradient = run(case, objective, "logits", None)
    assert out.forward_kl.isinf().all() and out.loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("forward", ["topk", "topk_tail", "exact"])
def test_a_set_larger_than_the_support_counts_the_support_alone(forward: Any) -> None:
    """Both give three ids a probability, and S has five: ids of -inf add nothing to loss or gradient."""
    generator = torch.Generator().manual_seed(0)
    support = torch.tensor([1, 4, 6])
    few = torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)
    student, logits = torch.full((2, 8, 9), -torch.inf, dtype=torch.float64).index_copy(2, support, few).unbind()
    objective = Objective(reverse_kl="exact", forward_kl=forward, gate="always", top_k=5)
    results = []
    for inputs, tokens, size in ((student, support[1], 9), (few[0], torch.tensor(1), 3)):
        leaf = inputs.clone().requires_grad_()
        teacher = TeacherLogits(logits if size == 9 else few[1])
        out = entropy_aware_loss(leaf, teacher, tokens.expand(8), None, objective=objective, vocab_size=size)
        out.loss.sum().backward()
        assert leaf.grad is not None
        results.append((out.loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1][:, support], results[1][1])
    assert not results[0][1].index_fill(1, support, 0).any()
