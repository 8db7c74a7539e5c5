"""What all ranks know of each token after the one collective of the forward pass, for any kind of teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Checks, require_integers, require_shape
from .contribution import Rows, Wanted
from .settings import Objective
from .teacher import TeacherTopK, entropy_bounds
from .terms import KeptSet
from .vocab_parallel import Softmax


@dataclass(frozen=True)
class Evidence:
    """What the ranks know together after the collective."""

    student: Softmax
    student_logprob: Tensor
    teacher_logprob: Tensor
    teacher_entropy: Tensor  # or its lower bound
    entropy_upper: Tensor
    teacher: Softmax | None = None
    gaps: tuple[Tensor, Tensor] | None = None  # G_s, G_t
    kept: KeptSet | None = None


def check_top_k(teacher: TeacherTopK, tokens: int, objective: Objective, vocab_size: int, checks: Checks) -> None:
    """Refuse top-k log-probs of another shape, too few of them, and such that are none."""
    require_integers("teacher.ids", teacher.ids)
    require_shape("teacher.ids", teacher.ids, (tokens, None), "the student has rows")
    given = teacher.ids.shape[1]
    wanted = min(objective.top_k, vocab_size) if objective.has_forward else 1
    if given < wanted:
        raise ValueError(f"teacher.ids: {given} columns, the objective wants top_k={wanted}")
    require_shape("teacher.logprobs", teacher.logprobs, (tokens, given), "teacher.ids has")
    require_shape("teacher.token_logprob", teacher.token_logprob, (tokens,), "the student has rows")
    checks.refuse_top_k(teacher.logprobs, teacher.ids, vocab_size)
    checks.refuse_logprobs("teacher.token_logprob", teacher.token_logprob)
    if teacher.entropy is not None:
        require_shape("teacher.entropy", teacher.entropy, (tokens,), "the student has rows")
        checks.refuse_entropy("teacher.entropy", teacher.entropy)


def wanted_of(
    objective: Objective, top_k: TeacherTopK | None, tokens: Tensor, teacher_tokens: Tensor, vocab_size: int
) -> Wanted:
    """What the vocabulary's shards are asked.

    With a `TeacherTopK` they exchange 4 + k numbers a token, or 5 + k with a tail; else 10, and 3 k more where S is to
    be found.
    """
    tail = objective.forward_kl == "topk_tail"
    if top_k is not None:
        return Wanted(torch.cat([tokens[:, None], top_k.ids[:, : objective.top_k].long()], dim=1), tail=tail)
    k = min(objective.top_k, vocab_size) if tail or objective.forward_kl == "topk" else 0
    return Wanted(tokens[:, None], teacher_tokens, k, tail)


def from_top_k(
    whole: Rows, wanted: Wanted, teacher: TeacherTopK, vocab_size: int, checks: Checks, name: str
) -> Evidence:
    """From the contribution of the whole vocabulary; ``name`` is the student's in refusals of its logits."""
    student = Softmax(*whole["student"])
    checks.refuse_broken(name, student.broken)
    checks.run()
    dtype, ids = student.total.dtype, wanted.asked[:, 1:]
    k = ids.shape[1]
    logprobs = teacher.logprobs[:, :k].detach().to(dtype)
    student_logprobs = student.logprob(whole["asked"])
    teacher_rest = student_rest = None
    if wanted.tail:
        teacher_rest = (1 - logprobs.exp().sum(1)).clamp_min(0) * (k < vocab_size)
        student_rest = whole["student_rest"][0] / student.total
    if teacher.entropy is None:
        lower, upper = entropy_bounds(logprobs, vocab_size)
    else:
        lower = upper = teacher.entropy.detach().to(dtype)
    return Evidence(
        student=student,
        student_logprob=student_logprobs[0],
        teacher_logprob=teacher.token_logprob.detach().to(dtype),
        teacher_entropy=lower,
        entropy_upper=upper,
        kept=KeptSet(ids, logprobs, student_logprobs[1:].T, teacher_rest, student_rest),
    )


def from_both(whole: Rows, checks: Checks, name: str, teacher_name: str) -> Evidence:
    """From the contribution of the whole vocabulary, where the teacher's logits are a part of it."""
    student, teacher = Softmax(*whole["student"]), Softmax(*whole["teacher"])
    checks.refuse_broken(name, student.broken)
    checks.refuse_broken(teacher_name, teacher.broken)
    checks.run()
    kept = None
    if "ids" in whole:
        sides = {"student": student, "teacher": teacher}
        kept = KeptSet(
            ids=whole["ids"].T.long(),
            teacher_logprobs=teacher.logprob(whole["teacher_ids"]).T,
            student_logprobs=student.logprob(whole["student_ids"]).T,
            **{f"{name}_rest": whole[f"{name}_rest"][0] / side.total for name, side in sides.items()}
            if "student_rest" in whole
            else {},
        )
    return Evidence(
        student=student,
        student_logprob=student.logprob(whole["asked"])[0],
        teacher_logprob=teacher.logprob(whole["teacher_token"])[0],
        teacher_entropy=teacher.entropy,
        entropy_upper=teacher.entropy,
        teacher=teacher,
        gaps=(whole["gap"][0], whole["gap"][1]),
        kept=kept,
    )
