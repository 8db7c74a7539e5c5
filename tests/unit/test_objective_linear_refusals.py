"""Inputs and calls that the linear form refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eaopd_megatron.objective import (
    Objective,
    TeacherHidden,
    TeacherLogits,
    entropy_aware_loss,
    linear_token_statistics,
)
from tests.distributed.objective.linear_cases import (
    call_linear,
    make_linear_case,
)


def test_a_second_backward_fails_clearly() -> None:
    linear = make_linear_case()
    out = call_linear(linear, student_hidden=linear.hidden.requires_grad_())
    out.loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_entropy_aware_loss: backward ran already"):
        out.loss.sum().backward()


def test_a_double_backward_fails_clearly() -> None:
    """The gradient's own derivative is not there; zeros in its place would be believed."""
    linear = make_linear_case()
    out = call_linear(linear, student_hidden=linear.hidden.requires_grad_())
    with pytest.raises(RuntimeError, match="linear_entropy_aware_loss: its gradient has no derivative"):
        torch.autograd.grad(out.loss.sum(), linear.hidden, create_graph=True)


@pytest.mark.parametrize("changed", ["student_hidden", "student_head_weight", "teacher"])
def test_inputs_that_change_before_backward_are_noticed(changed: str) -> None:
    """An optimiser step in between would give the gradient at other weights than the loss."""
    linear = make_linear_case()
    given = {
        "student_hidden": linear.hidden.requires_grad_(),
        "student_head_weight": linear.head,
        "teacher": linear.teacher_head,
    }
    out = call_linear(linear, objective=Objective.preset("rkl"))
    with torch.no_grad():
        given[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.sum().backward()


def test_without_gradient_there_is_no_graph() -> None:
    linear = make_linear_case()
    assert not call_linear(linear).loss.requires_grad
    with torch.no_grad():
        assert not call_linear(linear, student_hidden=linear.hidden.requires_grad_()).loss.requires_grad


@pytest.mark.parametrize("preset", Objective.PRESETS)
def test_hidden_states_serve_every_objective(preset: str) -> None:
    assert Objective.preset(preset).refusal("hidden") is None


def test_a_teacher_that_cannot_serve_the_objective() -> None:
    linear = make_linear_case()
    with pytest.raises(ValueError, match=r'^objective: reverse_kl="exact" needs .* logits or hidden states$'):
        call_linear(linear, linear.case.top_k(torch.float64), objective=Objective.preset("rkl"))
    for teacher in (TeacherLogits(linear.case.teacher), linear.teacher_hidden):
        with pytest.raises(ValueError, match=r"^teacher: .*, expected TeacherHidden or TeacherTopK"):
            call_linear(linear, teacher)
    with pytest.raises(ValueError, match=r"^teacher: TeacherHidden, expected TeacherLogits or TeacherTopK"):
        entropy_aware_loss(
            linear.case.student,
            TeacherHidden(linear.teacher_hidden, linear.teacher_head),  # type: ignore[arg-type]
            linear.case.tokens,
            None,
            objective=Objective(),
            vocab_size=linear.case.vocab_size,
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_hidden": torch.zeros(24, 8)}, r"student_head_weight: torch.float64, expected torch.float32 as"),
        ({"student_hidden": torch.zeros(24, 8).double()}, r"student_head_weight: shape \[48, 9\], expected \[48, 8\]"),
        ({"student_hidden": torch.zeros(24, 9).long()}, r"student_hidden: torch.int64 of shape \[24, 9\]"),
        ({"student_hidden": torch.zeros(24, 1, 9)}, r"student_hidden: torch.float32 of shape \[24, 1, 9\]"),
        ({"student_head_weight": torch.zeros(9)}, r"student_head_weight: torch.float32 of shape \[9\]"),
        ({"vocab_size": 49}, r"vocab_size: 49 is not in 1\.\.48 \(student_head_weight has 48 columns"),
        ({"chunk": 0}, r"chunk: 0 is not at least 1"),
        ({"hidden_grad": "sum"}, r"hidden_grad: 'sum' is not one of all_reduce, partial"),
        ({"tokens": torch.zeros(23).long()}, r"tokens: shape \[23\], expected \[24\]"),
        ({"tokens": torch.full((24,), 43)}, r"tokens: id 43 in row 0 is outside the vocabulary of 43"),
        ({"teacher_tokens": torch.full((24,), -1)}, r"teacher_tokens: id -1 in row 0 is outside"),
        ({"old_logprobs": torch.ones(24)}, r"old_logprobs: row 0 holds 1, no log-prob"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        call_linear(make_linear_case(), **changes)


def test_a_teacher_of_another_layout_is_named() -> None:
    linear = make_linear_case()
    hidden, head = linear.teacher_hidden, linear.teacher_head
    for teacher, message in (
        (TeacherHidden(hidden[1:], head), r"teacher.hidden: shape \[23, 15\], expected \[24, 15\]"),
        (TeacherHidden(hidden, head[1:]), r"teacher.head_weight: shape \[47, 15\], expected \[48, 15\]"),
        (TeacherHidden(hidden, head[:, 1:]), r"teacher.head_weight: shape \[48, 14\], expected \[48, 15\]"),
        (TeacherHidden(hidden.float(), head), r"teacher.head_weight: torch.float64, expected torch.float32"),
        (TeacherHidden(hidden[0], head), r"teacher.hidden: torch.float64 of shape \[15\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call_linear(linear, teacher)
    top = linear.case.top_k(torch.float64)
    with pytest.raises(ValueError, match=r"^teacher\.ids: 4 columns, the objective wants top_k=5"):
        call_linear(linear, linear.case.top_k(torch.float64, columns=4))
    with pytest.raises(ValueError, match=r"^teacher\.logprobs: row 2 holds NaN"):
        top.logprobs[2, 0] = torch.nan
        call_linear(linear, top)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_hidden_states_without_a_softmax_are_refused(value: float) -> None:
    linear = make_linear_case(dtype=torch.float32)
    linear.hidden[4, 0] = value
    for teacher in (None, linear.case.top_k(torch.float32)):
        with pytest.raises(ValueError, match=r"^student_hidden · student_head_weight: row 4 holds NaN or \+inf"):
            call_linear(linear, teacher)
    with pytest.raises(ValueError, match=r"^hidden · head_weight: row 4 holds NaN or \+inf"):
        linear_token_statistics(linear.hidden, linear.head, linear.case.tokens, vocab_size=linear.case.vocab_size)
    linear = make_linear_case(dtype=torch.float32)
    linear.teacher_hidden[5, 0] = value
    with pytest.raises(ValueError, match=r"^teacher\.hidden · teacher\.head_weight: row 5 holds NaN or \+inf"):
        call_linear(linear)
