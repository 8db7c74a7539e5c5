"""The dense oracle and the call against the paper's formulas, written out a token at a time in plain Python floats."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from eaopd_megatron.objective import Objective, TeacherLogits, TeacherTopK, entropy_aware_loss, entropy_bounds
from eaopd_megatron.objective.dense_reference import dense_loss
from tests.distributed.objective.cases import make_case


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def paper(
    student: list[float],
    teacher: list[float],
    token: int,
    old: float | None,
    *,
    forward: str,
    reverse: str,
    threshold: float,
    k: int,
    alpha: float,
    clip: float,
) -> float:
    """L_t of one token, from the table of the paper and the two variants of its terms."""
    q, p = softmax(student), softmax(teacher)
    entropy = -sum(x * math.log(x) for x in p)
    pi_old = q[token] if old is None else math.exp(old)
    advantage = math.log(p[token]) - math.log(pi_old)
    ratio = q[token] / pi_old
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    terms = {
        "sampled": -min(ratio * advantage, clipped * advantage),
        "exact": sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)),
        "none": 0.0,
    }
    kept = sorted(range(len(p)), key=lambda v: (-teacher[v], v))[:k]
    mass, student_mass = sum(p[v] for v in kept), sum(q[v] for v in kept)
    topk = sum(p[v] / mass * math.log(p[v] / mass / q[v]) for v in kept)
    tail = sum(p[v] * math.log(p[v] / q[v]) for v in kept) + (1 - mass) * math.log((1 - mass) / (1 - student_mass))
    forwards = {
        "topk": topk,
        "topk_tail": tail,
        "exact": sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
        "none": 0.0,
    }
    return terms[reverse] + alpha * (entropy > threshold) * forwards[forward]


@pytest.mark.parametrize("reverse", ["sampled", "exact", "none"])
@pytest.mark.parametrize("forward", ["topk", "topk_tail", "exact", "none"])
@pytest.mark.parametrize("with_old", [True, False])
def test_oracle_and_call_are_the_papers_formula(reverse: Any, forward: Any, with_old: bool) -> None:
    case = make_case()
    objective = Objective(
        reverse_kl=reverse, forward_kl=forward, threshold=case.threshold(), top_k=4, forward_weight=1.5, clip=0.1
    )
    old = case.old_logprobs if with_old else None
    want = [
        paper(
            case.student[row, : case.vocab_size].tolist(),
            case.teacher[row, : case.vocab_size].tolist(),
            int(case.tokens[row]),
            float(case.old_logprobs[row]) if with_old else None,
            forward=forward,
            reverse=reverse,
            threshold=objective.threshold,
            k=4,
            alpha=1.5,
            clip=0.1,
        )
        for row in range(len(case.tokens))
    ]
    for call in (dense_loss, entropy_aware_loss):
        out = call(
            case.student,
            TeacherLogits(case.teacher),
            case.tokens,
            old,
            objective=objective,
            vocab_size=case.vocab_size,
        )
        torch.testing.assert_close(out.loss, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_the_case_exercises_the_clip_on_both_sides_for_both_signs_of_the_advantage() -> None:
    case = make_case(n=60)
    out = dense_loss(
        case.student,
        TeacherLogits(case.teacher),
        case.tokens,
        case.old_logprobs,
        objective=Objective.preset("opd"),
        vocab_size=case.vocab_size,
    )
    advantage = out.teacher_logprob - case.old_logprobs
    ratio = (out.student_logprob - case.old_logprobs).exp()
    for positive in (True, False):
        sign = (advantage > 0) == positive
        assert (
            (sign & (ratio > 1.2)).any() and (sign & (ratio < 0.8)).any() and (sign & ((ratio - 1).abs() < 0.1)).any()
        )
    assert torch.equal(out.clipped, ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8)))


def test_the_label_map_looks_up_only_the_teachers_log_prob() -> None:
    """The paper's terminal map: the student's stop is scored by the teacher's own stop, and nothing else changes."""
    case = make_case(layout="even")
    mapped = (case.tokens + 1) % case.vocab_size
    arguments: dict[str, Any] = {"objective": Objective(top_k=4, threshold=1.0), "vocab_size": case.vocab_size}
    plain = entropy_aware_loss(case.student, TeacherLogits(case.teacher), case.tokens, None, **arguments)
    out = entropy_aware_loss(
        case.student, TeacherLogits(case.teacher), case.tokens, None, teacher_tokens=mapped, **arguments
    )
    log_p = case.teacher.log_softmax(1)
    torch.testing.assert_close(out.teacher_logprob, log_p.gather(1, mapped[:, None])[:, 0])
    assert torch.equal(out.student_logprob, plain.student_logprob)
    assert torch.equal(out.forward_kl, plain.forward_kl) and torch.equal(out.gate, plain.gate)
    torch.testing.assert_close(out.loss - plain.loss, plain.teacher_logprob - out.teacher_logprob)


def test_the_entropy_lies_between_the_bounds_and_the_bounds_close_with_k() -> None:
    case = make_case(n=60, layout="even")
    widths = []
    for k in (1, 4, 16, 47, 48):
        top = case.top_k(torch.float64, columns=k)
        lower, upper = entropy_bounds(top.logprobs, case.vocab_size)
        assert top.entropy is not None
        assert (lower <= top.entropy + 1e-12).all() and (top.entropy <= upper + 1e-12).all()
        widths.append((upper - lower).sum())
    assert all(narrow < wide for wide, narrow in itertools.pairwise(widths))
    assert widths[-1] == 0


def test_the_bounds_are_the_tightest() -> None:
    """A rest in pieces of the smallest known probability has the lower bound's entropy, an even one the upper's."""
    known = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    pieces = torch.cat([known, torch.full((2,), 0.1, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)])
    even = torch.cat([known, torch.full((7,), 0.2 / 7, dtype=torch.float64)])
    lower, upper = entropy_bounds(known.log()[None], 10)
    for bound, p in ((lower, pieces), (upper, even)):
        torch.testing.assert_close(bound, -torch.xlogy(p, p).sum()[None])


def test_a_sure_teacher_has_bounds_of_zero_and_no_nan() -> None:
    """Sum 1, rest 0; and log-probs of -inf, where rounding may leave a rest that has no room."""
    for second in (-30.0, -9999.0, -math.inf):
        logprobs = torch.tensor([[0.0, second], [math.log1p(-1e-7), second]])
        for bound in entropy_bounds(logprobs, 100):
            assert bound.isfinite().all() and (bound.abs() < 1e-2).all()


def test_the_gate_from_bounds_opens_only_where_it_is_certain() -> None:
    """Three tokens: certainly above, certainly below, and one whose 16 log-probs leave both open."""
    vocab_size = 1000
    masses = torch.tensor([0.95, 0.9999, 0.9], dtype=torch.float64)
    p = masses[:, None] * torch.tensor([[0.25] * 4, [0.997, 0.001, 0.001, 0.001], [0.97, 0.01, 0.01, 0.01]])
    teacher = TeacherTopK(torch.arange(4).repeat(3, 1), p.log(), torch.full((3,), -1.0, dtype=torch.float64))
    lower, upper = entropy_bounds(p.log(), vocab_size)
    assert lower[0] > 0.8 and upper[1] <= 0.8 and lower[2] <= 0.8 < upper[2]
    arguments: dict[str, Any] = {"old_logprobs": None, "vocab_size": vocab_size}
    student = torch.zeros(3, vocab_size, dtype=torch.float64)
    tokens = torch.zeros(3, dtype=torch.int64)
    out = entropy_aware_loss(student, teacher, tokens, objective=Objective(top_k=4), **arguments)
    assert out.gate.tolist() == [1, 0, 0] and out.gate_ambiguous.tolist() == [False, False, True]
    assert torch.equal(out.teacher_entropy, lower)
    out = entropy_aware_loss(student, teacher, tokens, objective=Objective(top_k=4, gate="always"), **arguments)
    assert out.gate.tolist() == [1, 1, 1] and not out.gate_ambiguous.any()


def test_only_the_first_top_k_columns_count() -> None:
    """A teacher that sends 20 columns must not turn the objective's top 4 into a top 20."""
    case = make_case()
    wide, narrow = (
        case.top_k(torch.float64, columns=20, entropy=False),
        case.top_k(torch.float64, columns=4, entropy=False),
    )
    objective = Objective(top_k=4, threshold=case.threshold())
    outs = [
        entropy_aware_loss(case.student, teacher, case.tokens, None, objective=objective, vocab_size=case.vocab_size)
        for teacher in (wide, narrow)
    ]
    for name, value in vars(outs[0]).items():
        assert torch.equal(value, getattr(outs[1], name)), name
