"""Inputs for the tests of the linear form: hidden states and heads whose products have the traps of `cases.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import Objective, TeacherHidden, TeacherTopK, TokenLosses, linear_entropy_aware_loss
from eaopd_megatron.objective import linear as linear_head
from tests.distributed.objective.cases import TOLERANCE, TOP_K, Case, assert_near, complete, dense, sizes, unchanged

WIDTH, TEACHER_WIDTH = 9, 15


@dataclass(frozen=True)
class LinearCase:
    """Hidden states [n, h] and heads [padded, h] over the whole padded vocabulary, and the case of their products."""

    case: Case
    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor


def make_linear_case(
    *, ranks: int = 1, layout: str = "padded", dtype: torch.dtype = torch.float64, n: int = 24, seed: int = 0
) -> LinearCase:
    """A teacher of another width; NaN in the heads' padded rows; id 0 in S of every third row.

    In bf16 all factors are multiples of 0.5, so that the logits have no rounding error and tie in every row. Its heads
    have no common direction, along which the gradient is 0 but for rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size, padded = sizes(ranks, layout)
    spread = torch.linspace(0.5, 4, n, dtype=torch.float64)[:, None] / 2

    def factors(width: int, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.randn(n, width, generator=generator, dtype=torch.float64) * scale
        head = torch.randn(padded, width, generator=generator, dtype=torch.float64) * (2 / width) ** 0.5
        if dtype == torch.bfloat16:
            hidden, head = (hidden * 2).round() / 2, (head * 2).round() / 2
        # The last column adds the same to all logits.
        common = torch.full((padded, 1), 0.0 if dtype == torch.bfloat16 else 3.0, dtype=torch.float64)
        return torch.cat([hidden, torch.ones(n, 1)], 1), torch.cat([head, common], 1)

    hidden, head = factors(WIDTH - 1, spread.flip(0))
    teacher_hidden, teacher_head = factors(TEACHER_WIDTH - 2, spread)
    logits = teacher_hidden @ teacher_head.T
    boost = torch.zeros(n, 1, dtype=torch.float64)
    boost[::3, 0] = logits[::3, :vocab_size].amax(1) - 0.25 - logits[::3, 0]
    teacher_hidden = torch.cat([teacher_hidden, boost], 1)
    teacher_head = torch.cat([teacher_head, torch.zeros(padded, 1)], 1)
    teacher_head[0, -1] = 1
    hidden, head, teacher_hidden, teacher_head = (x.to(dtype) for x in (hidden, head, teacher_hidden, teacher_head))
    products = [a.double() @ b.double().T for a, b in ((hidden, head), (teacher_hidden, teacher_head))]
    if dtype == torch.bfloat16:
        assert all(torch.equal(product, product.to(dtype).double()) for product in products)
    case = complete(products[0].to(dtype), products[1].to(dtype), vocab_size, generator)
    for weight in (head, teacher_head):
        weight[vocab_size:] = torch.nan
    return LinearCase(case, hidden, head, teacher_hidden, teacher_head)


def rows_of(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's rows of a head, as new memory."""
    return (value if group is None else value.chunk(group.size())[group.rank()]).clone()


@contextlib.contextmanager
def small_tiles(elements: int = 40) -> Iterator[None]:
    """Tiles so small that a tiny vocabulary has several blocks."""
    with mock.patch.object(linear_head, "CPU_TILE_ELEMENTS", elements):
        yield


@dataclass(frozen=True)
class Result:
    """What a call gave, and its gradients on this rank."""

    out: TokenLosses
    hidden: Tensor
    head: Tensor


def run_linear(
    linear: LinearCase,
    objective: Objective,
    signal: str,
    group: ProcessGroup | None,
    *,
    chunk: int | None = 7,
    old: bool = True,
    tile: int = 40,
    teacher: TeacherTopK | None = None,
    **arguments: Any,
) -> Result:
    """The call on this rank's rows of the heads. Fails where the call changes one of its inputs."""
    case = linear.case
    hidden, head = linear.hidden.clone().requires_grad_(), rows_of(linear.head, group).requires_grad_()
    given = {"hidden": hidden, "head": head, "tokens": case.tokens, "upstream": case.upstream}
    served: TeacherHidden | TeacherTopK
    if signal == "hidden":
        served = TeacherHidden(linear.teacher_hidden.clone(), rows_of(linear.teacher_head, group))
        given |= {"teacher": served.hidden, "teacher_head": served.head_weight}
    else:
        served = teacher or case.top_k(case.old_logprobs.dtype)
        given |= {"ids": served.ids, "logprobs": served.logprobs, "token_logprob": served.token_logprob}
    with small_tiles(tile), unchanged(given):
        out = linear_entropy_aware_loss(
            hidden,
            head,
            served,
            case.tokens,
            case.old_logprobs if old else None,
            teacher_tokens=case.teacher_tokens,
            objective=objective,
            vocab_size=case.vocab_size,
            group=group,
            chunk=chunk,
            **arguments,
        )
        out.loss.backward(case.upstream.to(out.loss.dtype))
    assert hidden.grad is not None and head.grad is not None
    assert hidden.grad.dtype == hidden.dtype and head.grad.dtype == head.dtype
    return Result(out, hidden.grad, head.grad)


def linear_oracle(
    linear: LinearCase,
    objective: Objective,
    signal: str,
    group: ProcessGroup | None,
    *,
    old: bool = True,
    teacher: TeacherTopK | None = None,
) -> tuple[Any, list[Tensor], Tensor]:
    """The dense oracle's values, and its gradients over the hidden states, each rank's part, and over the head."""
    case = linear.case
    hidden, head = linear.hidden.double(), linear.head.double().nan_to_num(nan=0)
    full = linear.teacher_hidden.double() @ linear.teacher_head.double().T if signal == "hidden" else None
    out, gradient = dense(case, objective, hidden @ head.T, full, old, teacher)
    ranks = 1 if group is None else group.size()
    parts = [a @ b for a, b in zip(gradient.chunk(ranks, dim=1), head.chunk(ranks), strict=True)]
    return out, parts, gradient.T @ hidden


def compare_linear(
    linear: LinearCase, objective: Objective, signal: str, group: ProcessGroup | None, **arguments: Any
) -> Any:
    """Values and both gradients of the call against the oracle; returns the oracle's values."""
    case = linear.case
    got = run_linear(linear, objective, signal, group, **arguments)
    known = {name: value for name, value in arguments.items() if name in ("old", "teacher")}
    want, parts, on_head = linear_oracle(linear, objective, signal, group, **known)
    assert got.out.loss.dtype == case.old_logprobs.dtype
    for name in vars(want):
        assert_near(name, getattr(got.out, name), getattr(want, name), TOLERANCE[case.old_logprobs.dtype])
    tolerance = TOLERANCE[case.student.dtype]
    mine = torch.stack(parts).sum(0)
    if arguments.get("hidden_grad") == "partial" and group is not None:
        mine = parts[group.rank()]
    assert_near("gradient of the hidden states", got.hidden, mine, tolerance)
    mine = rows_of(on_head, group)
    # The scale is that of the whole head, since a rank may own rows where the gradient is tiny.
    assert_near("gradient of the head", got.head, mine, tolerance, scale=on_head)
    first = 0 if group is None else group.rank() * len(mine)
    assert not got.head[max(case.vocab_size - first, 0) :].any(), "a padded row has a gradient"
    return want


def call_linear(linear: LinearCase, teacher: Any = None, **changes: Any) -> TokenLosses:
    """The linear form on a case's own inputs, but for `changes`."""
    arguments: dict[str, Any] = {
        "student_hidden": linear.hidden,
        "student_head_weight": linear.head,
        "teacher": TeacherHidden(linear.teacher_hidden, linear.teacher_head) if teacher is None else teacher,
        "tokens": linear.case.tokens,
        "old_logprobs": linear.case.old_logprobs,
        "objective": Objective(top_k=TOP_K, threshold=linear.case.threshold()),
        "vocab_size": linear.case.vocab_size,
    }
    return linear_entropy_aware_loss(**{**arguments, **changes})
