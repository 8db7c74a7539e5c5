"""Statistics per token: partial ones of a vocabulary shard, their merge, and those over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaopd_megatron.objective.checks import InputChecks
from eaopd_megatron.objective.settings import Objective
from eaopd_megatron.objective.teacher import TeacherTopK, entropy_bounds
from eaopd_megatron.objective.vocab_parallel import (
    Softmax,
    VocabShard,
    gather_local_logits,
    merge_gap,
    merge_softmax,
    partial_sums,
    shard_top_k,
    top_k_positions,
)

PartialStats = dict[str, Tensor]
"""Name -> [r, tokens]: the sums of `partial_sums`; "gathered" [g] student logits of StatsRequest.gather_ids;
"teacher_token" [1]; and a shard's top-k candidates "ids", "student_top_k", "teacher_top_k" [k]."""


@dataclass(frozen=True)
class StatsRequest:
    """What the objective needs of every vocabulary shard besides its sums."""

    gather_ids: Tensor  # [tokens, g] ids whose student logits are needed, the sampled token first
    teacher_token_ids: Tensor | None = None  # [tokens] ids whose teacher logit is needed, if the teacher has logits
    top_k: int = 0  # size of the set S to select from the teacher's logits; 0: S is gather_ids[:, 1:]
    with_tail: bool = False  # whether the probability outside S is needed

    @classmethod
    def for_objective(
        cls,
        objective: Objective,
        teacher_top_k: TeacherTopK | None,
        tokens: Tensor,
        teacher_tokens: Tensor,
        vocab_size: int,
    ) -> StatsRequest:
        """Return the request of an objective.

        A rank exchanges 4 + k numbers per token with a `TeacherTopK` (5 + k with a tail), else 10, and 3 k (+ 2 with a
        tail) more where S is selected from the teacher's logits.
        """
        with_tail = objective.forward_kl == "topk_tail"
        if teacher_top_k is not None:
            top_k_ids = teacher_top_k.ids[:, : objective.top_k].long()
            return cls(torch.cat([tokens[:, None], top_k_ids], dim=1), with_tail=with_tail)
        k = min(objective.top_k, vocab_size) if with_tail or objective.forward_kl == "topk" else 0
        return cls(tokens[:, None], teacher_tokens, k, with_tail)

    def rows(self, rows: slice) -> StatsRequest:
        """Return the request of some of the tokens."""
        teacher_token_ids = None if self.teacher_token_ids is None else self.teacher_token_ids[rows]
        return replace(self, gather_ids=self.gather_ids[rows], teacher_token_ids=teacher_token_ids)


def compute_partial_stats(
    student: Tensor, teacher: Tensor | None, shard: VocabShard, request: StatsRequest, *, assume_finite: bool = False
) -> tuple[PartialStats, bool]:
    """Return the statistics of a shard's logits [tokens, vocab/tp], and whether these hold -inf.

    assume_finite: skip the check for -inf.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    if teacher is not None:
        dtype = torch.promote_types(dtype, teacher.dtype)
    set_ids = request.gather_ids[:, 1:]
    candidates: PartialStats = {}
    if request.top_k and teacher is not None:
        set_ids, _ = shard_top_k(teacher, shard, request.top_k)
        exists = (set_ids < shard.vocab_size).T
        candidates["ids"] = set_ids.T.to(dtype)
        for name, logits in (("student", student), ("teacher", teacher)):
            values = gather_local_logits(logits, shard, set_ids, dtype)
            candidates[f"{name}_top_k"] = torch.where(exists, values, -torch.inf)
    exclude = shard.local_columns(set_ids) if request.with_tail else None
    stats, has_neg_inf = partial_sums(
        student, teacher, shard, dtype=dtype, exclude=exclude, assume_finite=assume_finite
    )
    stats["gathered"] = gather_local_logits(student, shard, request.gather_ids, dtype)
    if teacher is not None and request.teacher_token_ids is not None:
        stats["teacher_token"] = gather_local_logits(teacher, shard, request.teacher_token_ids[:, None], dtype)
    return stats | candidates, has_neg_inf


def merge_partial_stats(parts: PartialStats) -> PartialStats:
    """Merge the statistics of several shards, each [shards, r, tokens], into those of their union, [r, tokens]."""
    student, alpha, delta = merge_softmax(parts["student"])
    merged = {"student": _stack(student), "gathered": parts["gathered"].sum(0)}
    softmaxes = {"student": (student, alpha)}
    if "teacher" in parts:
        teacher, alpha_t, delta_t = merge_softmax(parts["teacher"])
        softmaxes["teacher"] = teacher, alpha_t
        shift = delta - delta_t
        gap = (
            merge_gap(parts["gap"][:, 0], parts["student"][:, 1], alpha, shift),
            merge_gap(parts["gap"][:, 1], parts["teacher"][:, 1], alpha_t, shift),
        )
        merged |= {"teacher": _stack(teacher), "gap": torch.stack(gap), "teacher_token": parts["teacher_token"].sum(0)}
    tails = {}
    if "student_tail" in parts:
        tails = {name: (alpha * parts[f"{name}_tail"][:, 0]).sum(0) for name, (_, alpha) in softmaxes.items()}
    if "ids" in parts:
        k = parts["ids"].shape[1]
        names = ("ids", "student_top_k", "teacher_top_k")
        candidates = {name: parts[name].permute(2, 0, 1).flatten(1) for name in names}
        order = top_k_positions(candidates["teacher_top_k"], candidates["ids"], candidates["ids"].shape[1])
        selected, others = order[:, :k], order[:, k:]
        for name in tails:
            # each shard left out its own candidates: those that were not selected are added, nothing is subtracted
            missing = candidates[f"{name}_top_k"].gather(1, others) - softmaxes[name][0].max_logit[:, None]
            tails[name] = tails[name] + missing.exp().sum(1)
        merged |= {name: values.gather(1, selected).T for name, values in candidates.items()}
    return merged | {f"{name}_tail": tail[None] for name, tail in tails.items()}


def _stack(softmax: Softmax) -> Tensor:
    return torch.stack([softmax.max_logit, softmax.sum_exp, softmax.sum_exp_x_shifted])


@dataclass(frozen=True)
class TopKSet:
    """The teacher's top-k set S: ids, log p and log q [tokens, k]; with a tail also the probabilities outside S."""

    ids: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    teacher_tail: Tensor | None = None  # [tokens]
    student_tail: Tensor | None = None  # [tokens]


@dataclass(frozen=True)
class ReducedStats:
    """Statistics over the whole vocabulary, replicated on every rank; [tokens] unless noted."""

    student: Softmax
    student_logprob: Tensor  # log q(y)
    teacher_logprob: Tensor  # log p(y)
    teacher_entropy: Tensor  # H(p), or its lower bound
    teacher_entropy_upper: Tensor
    teacher: Softmax | None = None  # if the teacher's whole distribution is known
    gaps: tuple[Tensor, Tensor] | None = None  # G_s, G_t
    top_k: TopKSet | None = None

    @classmethod
    def from_merged(
        cls,
        merged: PartialStats,
        request: StatsRequest,
        teacher_top_k: TeacherTopK | None,
        vocab_size: int,
        checks: InputChecks,
        names: tuple[str, str],
    ) -> ReducedStats:
        """Return the statistics of the merged shards. Raise ValueError for logits whose softmax is undefined.

        names: what errors call the student's and the teacher's logits.
        """
        student, teacher = Softmax(*merged["student"]), Softmax(*merged["teacher"]) if "teacher" in merged else None
        checks.refuse_non_finite(names[0], student.has_nan_or_inf)
        if teacher is not None:
            checks.refuse_non_finite(names[1], teacher.has_nan_or_inf)
        checks.raise_first()
        logprobs = student.logprob(merged["gathered"])
        student_tail = merged["student_tail"][0] / student.sum_exp if request.with_tail else None
        if teacher_top_k is not None:
            dtype, ids = student.sum_exp.dtype, request.gather_ids[:, 1:]
            k = ids.shape[1]
            teacher_logprobs, teacher_tail = teacher_top_k.logprobs[:, :k].detach().to(dtype), None
            if request.with_tail:
                teacher_tail = (1 - teacher_logprobs.exp().sum(1)).clamp_min(0) * (k < vocab_size)
            if teacher_top_k.entropy is None:
                lower, upper = entropy_bounds(teacher_logprobs, vocab_size)
            else:
                lower = upper = teacher_top_k.entropy.detach().to(dtype)
            top_k = TopKSet(ids, teacher_logprobs, logprobs[1:].T, teacher_tail, student_tail)
            teacher_logprob = teacher_top_k.token_logprob.detach().to(dtype)
            return cls(student, logprobs[0], teacher_logprob, lower, upper, top_k=top_k)
        assert teacher is not None
        selected = None
        if request.top_k:
            selected = TopKSet(
                ids=merged["ids"].T.long(),
                teacher_logprobs=teacher.logprob(merged["teacher_top_k"]).T,
                student_logprobs=student.logprob(merged["student_top_k"]).T,
                teacher_tail=merged["teacher_tail"][0] / teacher.sum_exp if request.with_tail else None,
                student_tail=student_tail,
            )
        teacher_logprob, gaps = teacher.logprob(merged["teacher_token"])[0], (merged["gap"][0], merged["gap"][1])
        return cls(student, logprobs[0], teacher_logprob, teacher.entropy, teacher.entropy, teacher, gaps, selected)
