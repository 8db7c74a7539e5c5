"""What all ranks know of each token after the one collective of the forward pass, for any kind of teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaopd_megatron.objective.checks import Checks, require_integers, require_shape
from eaopd_megatron.objective.settings import Objective
from eaopd_megatron.objective.teacher import TeacherTopK, entropy_bounds
from eaopd_megatron.objective.top_k import first_k, shard_top_k
from eaopd_megatron.objective.vocab_parallel import Shard, Softmax, look_up, merge, merge_gap, partial_sums

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Wanted:
    """What a shard is asked besides its sums."""

    asked: Tensor  # [n, a] ids under which the student's logits are wanted, the sampled token first
    teacher_token: Tensor | None = None  # [n] id under which the teacher's logit is wanted, where there are logits
    k: int = 0  # size of the set S to be found in the teacher's logits; 0: none
    tail: bool = False  # whether the probability outside S is wanted; S is asked[:, 1:] where it is not to be found

    def of(self, tokens: slice) -> Wanted:
        """The same for some of the tokens."""
        token = None if self.teacher_token is None else self.teacher_token[tokens]
        return replace(self, asked=self.asked[tokens], teacher_token=token)


def contribution(
    student: Tensor, teacher: Tensor | None, shard: Shard, wanted: Wanted, *, finite: bool = False
) -> tuple[Rows, bool]:
    """From logits [n, columns] of the shard; also whether they hold -inf. finite: see `partial_sums`."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    if teacher is not None:
        dtype = torch.promote_types(dtype, teacher.dtype)
    left_out = wanted.asked[:, 1:]
    candidates: Rows = {}
    if wanted.k and teacher is not None:
        left_out, _ = shard_top_k(teacher, shard, wanted.k)
        real = (left_out < shard.vocab_size).T
        candidates["ids"] = left_out.T.to(dtype)
        candidates["student_ids"] = torch.where(real, look_up(student, shard, left_out, dtype), -torch.inf)
        candidates["teacher_ids"] = torch.where(real, look_up(teacher, shard, left_out, dtype), -torch.inf)
    leave_out = shard.locate(left_out) if wanted.tail else None
    rows, careful = partial_sums(student, teacher, shard, dtype=dtype, leave_out=leave_out, finite=finite)
    rows["asked"] = look_up(student, shard, wanted.asked, dtype)
    if teacher is not None and wanted.teacher_token is not None:
        rows["teacher_token"] = look_up(teacher, shard, wanted.teacher_token[:, None], dtype)
    return rows | candidates, careful


def join(parts: Rows) -> Rows:
    """The contribution of the union of shards: name -> [shards, r, n] becomes name -> [r, n]."""
    student, alpha, delta = merge(parts["student"])
    whole = {"student": _stacked(student), "asked": parts["asked"].sum(0)}
    sides = {"student": (student, alpha)}
    if "teacher" in parts:
        teacher, alpha_t, delta_t = merge(parts["teacher"])
        sides["teacher"] = teacher, alpha_t
        growth = delta - delta_t
        gap = (
            merge_gap(parts["gap"][:, 0], parts["student"][:, 1], alpha, growth),
            merge_gap(parts["gap"][:, 1], parts["teacher"][:, 1], alpha_t, growth),
        )
        whole |= {
            "teacher": _stacked(teacher),
            "gap": torch.stack(gap),
            "teacher_token": parts["teacher_token"].sum(0),
        }
    rests = (
        {name: (weight * parts[f"{name}_rest"][:, 0]).sum(0) for name, (_, weight) in sides.items()}
        if ("student_rest" in parts)
        else {}
    )
    if "ids" in parts:
        k = parts["ids"].shape[1]
        names = ("ids", "student_ids", "teacher_ids")
        values = {name: parts[name].permute(2, 0, 1).flatten(1) for name in names}
        order = first_k(values["teacher_ids"], values["ids"], values["ids"].shape[1])
        best, others = order[:, :k], order[:, k:]
        for name in rests:
            # What no shard counted as a candidate, and the candidates that were not taken: nothing is subtracted.
            left = values[f"{name}_ids"].gather(1, others) - sides[name][0].maximum[:, None]
            rests[name] = rests[name] + left.exp().sum(1)
        whole |= {name: value.gather(1, best).T for name, value in values.items()}
    return whole | {f"{name}_rest": rest[None] for name, rest in rests.items()}


def _stacked(softmax: Softmax) -> Tensor:
    return torch.stack([softmax.maximum, softmax.total, softmax.weighted])


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


@dataclass(frozen=True)
class KeptSet:
    """The teacher's top-k set S: ids, log p and log q [n, k]; with a tail bucket the probabilities outside S [n]."""

    ids: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    teacher_rest: Tensor | None = None
    student_rest: Tensor | None = None
