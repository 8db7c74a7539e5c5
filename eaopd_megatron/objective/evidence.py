"""What all ranks know of each token after the one collective of the forward pass, for either kind of teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Checks, require_integers, require_shape
from .settings import Objective
from .teacher import TeacherTopK, entropy_bounds
from .terms import KeptSet
from .top_k import first_k, shard_top_k
from .vocab_parallel import Shard, Softmax, look_up, merge, merge_gap, partial_sums


@dataclass(frozen=True)
class Evidence:
    """What the ranks know together after the collective."""

    student: Softmax
    student_logprob: Tensor
    teacher_logprob: Tensor
    teacher_entropy: Tensor  # or its lower bound
    entropy_upper: Tensor
    careful: bool  # whether this rank's logits hold -inf
    teacher: Softmax | None = None
    gaps: tuple[Tensor, Tensor] | None = None  # G_s, G_t
    kept: KeptSet | None = None


def from_top_k(
    logits: Tensor,
    teacher: TeacherTopK,
    tokens: Tensor,
    objective: Objective,
    shard: Shard,
    checks: Checks,
) -> Evidence:
    """One collective of 4 + k numbers a token (5 + k with a tail): m, Z, A and the student's logits under S."""
    n, vocab_size = logits.shape[0], shard.vocab_size
    require_integers("teacher.ids", teacher.ids)
    require_shape("teacher.ids", teacher.ids, (n, None), "student_logits has rows")
    given = teacher.ids.shape[1]
    wanted = min(objective.top_k, vocab_size) if objective.has_forward else 1
    if given < wanted:
        raise ValueError(f"teacher.ids: {given} columns, the objective wants top_k={wanted}")
    k = min(given, objective.top_k)
    require_shape("teacher.logprobs", teacher.logprobs, (n, given), "teacher.ids has")
    require_shape("teacher.token_logprob", teacher.token_logprob, (n,), "student_logits has rows")
    checks.refuse_top_k(teacher.logprobs, teacher.ids, vocab_size)
    checks.refuse_logprobs("teacher.token_logprob", teacher.token_logprob)
    if teacher.entropy is not None:
        require_shape("teacher.entropy", teacher.entropy, (n,), "student_logits has rows")
        checks.refuse_entropy("teacher.entropy", teacher.entropy)
    checks.run()

    dtype = torch.promote_types(logits.dtype, torch.float32)
    ids, logprobs = teacher.ids[:, :k].long(), teacher.logprobs[:, :k].detach().to(dtype)
    tail = objective.forward_kl == "topk_tail"
    rows, careful = partial_sums(logits, None, shard, dtype=dtype, leave_out=shard.locate(ids) if tail else None)
    asked = torch.cat([tokens[:, None], ids], dim=1)
    parts = shard.exchange(rows | {"asked": look_up(logits, shard, asked, dtype)})
    student, alpha, _ = merge(parts["student"])
    checks.refuse_broken("student_logits", student.broken)
    checks.run()
    student_logprobs = student.logprob(shard.pick(parts["asked"], asked.T))
    teacher_rest = student_rest = None
    if tail:
        teacher_rest = (1 - logprobs.exp().sum(1)).clamp_min(0) * (k < vocab_size)
        student_rest = (alpha * parts["student_rest"][:, 0]).sum(0) / student.total
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
        careful=careful,
        kept=KeptSet(ids, logprobs, student_logprobs[1:].T, teacher_rest, student_rest),
    )


def from_logits(
    logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    teacher_tokens: Tensor,
    objective: Objective,
    shard: Shard,
    checks: Checks,
) -> Evidence:
    """One collective of 10 numbers a token, and of 3 k more where S has to be found: each rank's k candidates."""
    require_shape("teacher.logits", teacher_logits, tuple(logits.shape), "student_logits has")
    if not teacher_logits.dtype.is_floating_point:
        raise ValueError(f"teacher.logits: {teacher_logits.dtype}, expected floating point")
    checks.run()
    dtype = torch.promote_types(torch.promote_types(logits.dtype, teacher_logits.dtype), torch.float32)
    k = min(objective.top_k, shard.vocab_size)
    tail = objective.forward_kl == "topk_tail"
    candidates = None
    if tail or objective.forward_kl == "topk":
        candidates, _ = shard_top_k(teacher_logits, shard, k)
    leave_out = shard.locate(candidates) if tail and candidates is not None else None
    rows, careful = partial_sums(logits, teacher_logits, shard, dtype=dtype, leave_out=leave_out)
    rows["student_token"] = look_up(logits, shard, tokens[:, None], dtype)
    rows["teacher_token"] = look_up(teacher_logits, shard, teacher_tokens[:, None], dtype)
    if candidates is not None:
        real = (candidates < shard.vocab_size).T
        rows["ids"] = candidates.T.to(dtype)
        rows["student_ids"] = torch.where(real, look_up(logits, shard, candidates, dtype), -torch.inf)
        rows["teacher_ids"] = torch.where(real, look_up(teacher_logits, shard, candidates, dtype), -torch.inf)
    parts = shard.exchange(rows)
    student, alpha_s, delta_s = merge(parts["student"])
    teacher, alpha_t, delta_t = merge(parts["teacher"])
    checks.refuse_broken("student_logits", student.broken)
    checks.refuse_broken("teacher.logits", teacher.broken)
    checks.run()
    gaps = (
        merge_gap(parts["gap"][:, 0], parts["student"][:, 1], alpha_s, delta_s - delta_t),
        merge_gap(parts["gap"][:, 1], parts["teacher"][:, 1], alpha_t, delta_s - delta_t),
    )
    kept = None
    if candidates is not None:
        ids, of_teacher, of_student = (
            parts[name].permute(2, 0, 1).flatten(1) for name in ("ids", "teacher_ids", "student_ids")
        )
        order = first_k(of_teacher, ids, ids.shape[1])
        best, others = order[:, :k], order[:, k:]
        rests: dict[str, Tensor] = {}
        if tail:
            for name, side, alpha, values in (
                ("teacher", teacher, alpha_t, of_teacher),
                ("student", student, alpha_s, of_student),
            ):
                # What no rank counted as a candidate, and the candidates that were not taken: nothing is subtracted.
                left = (values.gather(1, others) - side.maximum[:, None]).exp().sum(1)
                rests[f"{name}_rest"] = ((alpha * parts[f"{name}_rest"][:, 0]).sum(0) + left) / side.total
        kept = KeptSet(
            ids=ids.gather(1, best).long(),
            teacher_logprobs=teacher.logprob(of_teacher.gather(1, best).T).T,
            student_logprobs=student.logprob(of_student.gather(1, best).T).T,
            **rests,
        )
    return Evidence(
        student=student,
        student_logprob=student.logprob(shard.pick(parts["student_token"], tokens[None]))[0],
        teacher_logprob=teacher.logprob(shard.pick(parts["teacher_token"], teacher_tokens[None]))[0],
        teacher_entropy=teacher.entropy,
        entropy_upper=teacher.entropy,
        careful=careful,
        teacher=teacher,
        gaps=gaps,
        kept=kept,
    )
