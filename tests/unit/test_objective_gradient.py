"""Values, gradients and properties of the objective on one rank."""

from __future__ import annotations

import math
from dataclasses import is_dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eaopd_megatron.objective import (
    Objective,
    TeacherLogits,
    TokenLosses,
    entropy_aware,
    entropy_aware_loss,
    summarise_teacher,
    token_statistics,
)
from tests.distributed.objective.cases import TOP_K, Case, compare, make_case, run
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


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_backward_fails_clearly(inplace: bool) -> None:
    case = make_case(dtype=torch.float32)
    leaf = case.student.clone().requires_grad_()
    out = entropy_aware_loss(
        leaf * 1.0,
        case.top_k(torch.float32),
        case.tokens,
        None,
        objective=Objective(top_k=TOP_K),
        vocab_size=case.vocab_size,
        inplace_backward=inplace,
    )
    out.loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        out.loss.sum().backward()


def test_a_double_backward_fails_clearly() -> None:
    """The gradient's own derivative is not there; zeros in its place would be believed."""
    case = make_case()
    leaf = case.student.clone().requires_grad_()
    out = entropy_aware_loss(
        leaf,
        case.top_k(torch.float64),
        case.tokens,
        None,
        objective=Objective(top_k=TOP_K),
        vocab_size=case.vocab_size,
    )
    with pytest.raises(RuntimeError, match="its gradient has no derivative"):
        torch.autograd.grad(out.loss.sum(), leaf, create_graph=True)


def test_logits_that_change_before_backward_are_noticed() -> None:
    case = make_case()
    leaf = case.student.clone().requires_grad_()
    logits = leaf * 1.0
    out = entropy_aware_loss(
        logits, TeacherLogits(case.teacher), case.tokens, None, objective=Objective(), vocab_size=case.vocab_size
    )
    with torch.no_grad():
        logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["eopd", "eopd_exact"])
def test_the_gradient_can_be_written_over_the_logits(preset: str, dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    objective = Objective.preset(preset, top_k=TOP_K)
    _, want = run(case, objective, "logits", None)
    leaf = case.student.clone().requires_grad_()
    logits = leaf.view_as(leaf) * 1.0
    out = entropy_aware_loss(
        logits,
        TeacherLogits(case.teacher),
        case.tokens,
        case.old_logprobs,
        teacher_tokens=case.teacher_tokens,
        objective=objective,
        vocab_size=case.vocab_size,
        inplace_backward=True,
    )
    out.loss.backward(case.upstream.to(out.loss.dtype))
    assert leaf.grad is not None and torch.equal(leaf.grad, want) and torch.equal(logits.detach(), want)


def test_writing_over_a_leaf_is_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="inplace_backward: student_logits is a leaf"):
        entropy_aware_loss(
            case.student.clone().requires_grad_(),
            TeacherLogits(case.teacher),
            case.tokens,
            None,
            objective=Objective(),
            vocab_size=case.vocab_size,
            inplace_backward=True,
        )


class Largest(TorchDispatchMode):
    """The largest new tensor that an operation makes inside, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and not func.is_view and "detach" not in str(func):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize(
    ("signal", "forward"),
    [("logits", "topk"), ("logits", "topk_tail"), ("logits", "exact"), ("topk", "topk"), ("topk", "topk_tail")],
)
def test_nothing_of_the_size_of_the_logits_is_made_besides_the_gradient(signal: str, forward: Any) -> None:
    n, vocab_size, chunk = 400, 300, 4
    generator = torch.Generator().manual_seed(0)
    student, logits = torch.randn(2, n, vocab_size, generator=generator).bfloat16().unbind()
    tokens = torch.zeros(n, dtype=torch.int64)
    teacher: Any = TeacherLogits(logits)
    if signal == "topk":
        teacher = summarise_teacher(logits, tokens, k=16, vocab_size=vocab_size)
    leaf = student.clone().requires_grad_()
    with Largest() as forward_pass:
        out = entropy_aware_loss(
            leaf, teacher, tokens, None, objective=Objective(forward_kl=forward), vocab_size=vocab_size, chunk=chunk
        )
    small = max(4 * chunk * vocab_size, 3 * 16 * n)  # a chunk's buffers; some numbers of each token
    assert forward_pass.elements <= small
    with Largest() as backward_pass:
        write = torch.autograd.grad(out.loss.sum(), leaf)
    assert backward_pass.elements == n * vocab_size == write[0].numel()


def saved_by(case: Case, objective: Objective) -> tuple[TokenLosses, list[Tensor]]:
    """The call and the tensors that it saves for backward."""
    saved: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = entropy_aware_loss(
            case.student.requires_grad_(),
            TeacherLogits(case.teacher),
            case.tokens,
            None,
            objective=objective,
            vocab_size=case.vocab_size,
            chunk=7,
        )
    return out, saved


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a tree of dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    return [found for field in vars(value).values() for found in tensors_in(field)] if is_dataclass(value) else []


@pytest.mark.parametrize(
    ("objective", "keeps"),
    [(Objective(), False), (Objective.preset("opd"), False), (Objective.preset("eopd_exact"), True)],
    ids=["eopd", "opd", "eopd_exact"],
)
def test_the_papers_objective_keeps_no_teacher_logits_for_backward(objective: Objective, keeps: bool) -> None:
    """The teacher's logits are as large as the student's; the sampled and the top-k term need them forward only."""
    case = make_case(dtype=torch.float32, n=40)
    out, saved = saved_by(case, objective)
    want = [case.student, case.teacher][: 1 + keeps]
    assert [value.data_ptr() for value in saved] == [value.data_ptr() for value in want]
    numbers = tensors_in(out.loss.grad_fn.recipe)  # type: ignore[union-attr]
    assert numbers and max(value.untyped_storage().nbytes() for value in numbers) <= 40 * 16 * 8


@pytest.mark.parametrize("reverse", ["sampled", "none"])
@pytest.mark.parametrize("gate", ["hard", "soft", "always", "never"])
def test_only_gated_rows_of_the_teacher_are_kept_for_backward(reverse: Any, gate: Any) -> None:
    """Without an exact reverse term a closed gate's row has no use in backward. Not a bit of the gradient depends on
    it."""
    case = make_case(dtype=torch.float32, n=40)
    objective = Objective(reverse_kl=reverse, forward_kl="exact", gate=gate, threshold=case.threshold())
    out, saved = saved_by(case, objective)
    opened = int((out.gate != 0).sum())
    assert 10 <= opened <= 30 if gate == "hard" else opened in (0, 40)
    assert [value.data_ptr() for value in saved[:1]] == [case.student.data_ptr()]
    row = case.teacher.shape[1] * 4
    assert sum(value.untyped_storage().nbytes() for value in saved[1:]) == opened * row
    if opened == 40:
        assert saved[1].data_ptr() == case.teacher.data_ptr(), "all rows are kept, so none needs to be copied"
    (gradient,) = torch.autograd.grad(out.loss, case.student, case.upstream)
    with mock.patch.object(entropy_aware, "_keep", lambda teacher, recipe: (teacher, recipe)):
        out, saved = saved_by(case, objective)
        assert saved[1].data_ptr() == case.teacher.data_ptr()
        (want,) = torch.autograd.grad(out.loss, case.student, case.upstream)
    assert torch.equal(gradient, want) and gradient.any() == (opened > 0 or reverse == "sampled")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gated_rows_have_the_oracles_gradient_also_where_it_is_written_over_the_logits(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype, n=40)
    objective = Objective(forward_kl="exact", threshold=case.threshold())
    compare(case, objective, "logits", None)
    _, want = run(case, objective, "logits", None)
    leaf = case.student.clone().requires_grad_()
    out = entropy_aware_loss(
        leaf * 1.0,
        TeacherLogits(case.teacher),
        case.tokens,
        case.old_logprobs,
        teacher_tokens=case.teacher_tokens,
        objective=objective,
        vocab_size=case.vocab_size,
        inplace_backward=True,
    )
    out.loss.backward(case.upstream.to(out.loss.dtype))
    assert leaf.grad is not None and torch.equal(leaf.grad, want)
