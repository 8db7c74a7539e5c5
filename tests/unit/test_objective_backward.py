"""The backward pass on one rank: the tensors it saves, its memory, writing over the logits, and its errors."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eaopd_megatron.objective import (
    Objective,
    TeacherLogits,
    TokenLosses,
    entropy_aware,
    entropy_aware_loss,
    summarise_teacher,
)
from tests.distributed.objective.cases import TOP_K, Case, compare, make_case, run


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
    numbers = tensors_in(out.loss.grad_fn.saved)  # type: ignore[union-attr]
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
    with mock.patch.object(entropy_aware, "_keep_needed_rows", lambda teacher, saved: (teacher, saved)):
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
