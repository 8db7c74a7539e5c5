"""Bad input gets one line that names the argument and the first bad row, instead of a wrong loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from eaopd_megatron.objective import Objective, TeacherLogits, entropy_aware_loss, summarise_teacher, token_statistics
from tests.distributed.objective.cases import TOP_K, Case, make_case


@pytest.fixture
def case() -> Case:
    return make_case(dtype=torch.float32)


def call(case: Case, teacher: Any = None, objective: Any = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "student_logits": case.student,
        "teacher": TeacherLogits(case.teacher) if teacher is None else teacher,
        "tokens": case.tokens,
        "old_logprobs": case.old_logprobs,
        "objective": objective or Objective(top_k=TOP_K),
        "vocab_size": case.vocab_size,
    }
    return entropy_aware_loss(**{**arguments, **changes})


def changed(value: Tensor, row: int, to: float) -> Tensor:
    value = value.clone()
    value[row if value.dim() == 1 else (row, 1)] = to
    return value


@pytest.mark.parametrize("argument", ["tokens", "teacher_tokens"])
@pytest.mark.parametrize("bad", ["vocab_size", -1])
def test_an_id_outside_the_vocabulary(case: Case, argument: str, bad: Any) -> None:
    """Also one of the padding's: its logit is there and means nothing."""
    outside = case.vocab_size if bad == "vocab_size" else bad
    ids = changed(changed(case.tokens, 7, outside), 9, outside)
    with pytest.raises(ValueError, match=rf"^{argument}: id {outside} in row 7 is outside the vocabulary of 43"):
        call(case, **{argument: ids})
    if argument == "tokens":
        for helper in (token_statistics, lambda *a, **k: summarise_teacher(*a, k=3, **k)):
            with pytest.raises(ValueError, match=rf"^tokens: id {outside} in row 7"):
                helper(case.student, ids, vocab_size=case.vocab_size)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(case: Case, value: float) -> None:
    with pytest.raises(ValueError, match=r"^student_logits: row 4 holds NaN or \+inf"):
        call(case, student_logits=changed(changed(case.student, 4, value), 6, value))
    with pytest.raises(ValueError, match=r"^student_logits: row 4 holds NaN or \+inf"):
        call(case, case.top_k(torch.float32), student_logits=changed(case.student, 4, value))
    with pytest.raises(ValueError, match=r"^teacher\.logits: row 4 holds NaN or \+inf"):
        call(case, TeacherLogits(changed(case.teacher, 4, value)))
    for helper in (token_statistics, lambda *a, **k: summarise_teacher(*a, k=3, **k)):
        with pytest.raises(ValueError, match=r"^logits: row 4 holds NaN or \+inf"):
            helper(changed(case.student, 4, value), case.tokens, vocab_size=case.vocab_size)


def test_a_row_of_minus_infinity_is_no_distribution(case: Case) -> None:
    student = case.student.clone()
    student[5] = -torch.inf
    with pytest.raises(ValueError, match=r"^student_logits: row 5 holds"):
        call(case, student_logits=student)


@pytest.mark.parametrize(
    ("field", "row", "value", "message"),
    [
        ("logprobs", 3, torch.nan, r"^teacher\.logprobs: row 3 holds NaN"),
        ("logprobs", 3, 0.5, r"^teacher\.logprobs: the probabilities of row 3 sum to .* not normalised"),
        ("ids", 3, 43, r"^teacher\.ids: id 43 in row 3 is outside the vocabulary"),
        ("ids", 3, -1, r"^teacher\.ids: id -1 in row 3 is outside the vocabulary"),
        ("token_logprob", 3, torch.nan, r"^teacher\.token_logprob: row 3 holds nan"),
        ("token_logprob", 3, 0.1, r"^teacher\.token_logprob: row 3 holds 0\.1"),
        ("entropy", 3, -0.01, r"^teacher\.entropy: row 3 holds -0\.01"),
        ("entropy", 3, torch.nan, r"^teacher\.entropy: row 3 holds nan"),
    ],
)
def test_a_bad_payload_of_a_teacher(case: Case, field: str, row: int, value: float, message: str) -> None:
    teacher = case.top_k(torch.float32)
    with pytest.raises(ValueError, match=message):
        call(case, replace(teacher, **{field: changed(getattr(teacher, field), row, value)}))


def test_log_probs_that_are_renormalised_over_the_set_and_shifted(case: Case) -> None:
    """The limit is 1 + 1e-3: rounding stays below it, a sum over less than the vocabulary does not."""
    teacher = case.top_k(torch.float32)
    whole = teacher.logprobs.log_softmax(1)
    call(case, replace(teacher, logprobs=whole + 5e-4))
    with pytest.raises(ValueError, match=r"^teacher\.logprobs: the probabilities of row 0 sum to 1\.002"):
        call(case, replace(teacher, logprobs=whole + 2e-3))


def test_an_id_that_a_teacher_names_twice(case: Case) -> None:
    teacher = case.top_k(torch.float32)
    ids = teacher.ids.clone()
    ids[6, 2] = ids[6, 0]
    with pytest.raises(ValueError, match=r"^teacher\.ids: row 6 names an id twice"):
        call(case, replace(teacher, ids=ids))


def test_an_entropy_of_rounding_is_accepted(case: Case) -> None:
    teacher = case.top_k(torch.float32)
    call(case, replace(teacher, entropy=changed(teacher.entropy, 3, -1e-6)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("argument", "shape"),
    [("tokens", (23,)), ("tokens", (24, 1)), ("teacher_tokens", (25,)), ("old_logprobs", (24, 2))],
)
def test_shapes_that_disagree(case: Case, argument: str, shape: tuple[int, ...]) -> None:
    value = torch.zeros(shape) if argument == "old_logprobs" else torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"^{argument}: shape \[.*\], expected \[24\]"):
        call(case, **{argument: value})


def test_a_teacher_of_another_layout(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^teacher\.logits: shape \[24, 47\], expected \[24, 48\]"):
        call(case, TeacherLogits(case.teacher[:, :-1]))
    teacher = case.top_k(torch.float32)
    for field in ("logprobs", "token_logprob", "entropy"):
        with pytest.raises(ValueError, match=rf"^teacher\.{field}: shape"):
            call(case, replace(teacher, **{field: getattr(teacher, field)[:-1]}))


def test_a_teacher_with_fewer_columns_than_top_k(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^teacher\.ids: 4 columns, the objective wants top_k=5"):
        call(case, case.top_k(torch.float32, columns=4))
    call(case, case.top_k(torch.float32, columns=4), Objective.preset("opd"))


def test_old_log_probs_that_are_none(case: Case) -> None:
    for value in (torch.nan, 0.1):
        with pytest.raises(ValueError, match=r"^old_logprobs: row 2 holds .*, no log-prob"):
            call(case, old_logprobs=changed(case.old_logprobs, 2, value))


@pytest.mark.parametrize("vocab_size", [0, 49])
def test_a_vocabulary_that_the_logits_cannot_hold(case: Case, vocab_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^vocab_size: {vocab_size} is not in 1\.\.48"):
        call(case, vocab_size=vocab_size)


def test_ids_and_logits_of_a_wrong_kind(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^tokens: torch\.float32, expected int64 ids"):
        call(case, tokens=case.tokens.float())
    with pytest.raises(ValueError, match=r"^student_logits: torch\.int64 of shape"):
        call(case, student_logits=case.student.nan_to_num().long())
    with pytest.raises(ValueError, match=r"^chunk: 0 is not at least 1"):
        call(case, chunk=0)
    with pytest.raises(ValueError, match=r"^k: 0 is not at least 1"):
        summarise_teacher(case.teacher, case.tokens, k=0, vocab_size=case.vocab_size)


@pytest.mark.parametrize("preset", ["eopd_exact", "rkl", "fkl"])
def test_a_teacher_that_cannot_serve_the_objective(case: Case, preset: str) -> None:
    with pytest.raises(ValueError, match=r"^objective: (reverse|forward)_kl=\"exact\" needs the teacher's whole"):
        call(case, case.top_k(torch.float32), Objective.preset(preset))


def test_the_type_of_the_teacher(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^teacher: Tensor, expected TeacherLogits or TeacherTopK"):
        call(case, case.teacher)
