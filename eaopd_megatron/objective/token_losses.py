"""Loss of a token and its gradient's coefficients, from numbers that every rank holds: no vocabulary, no collective.

The gradient over the student's logits is, for q and p the student's and the teacher's probabilities,

    q_j (kappa + w_R D_j) - w_p p_j - sum over i of target_i 1[j = S_i] - c 1[j = y]

with the gap D of `vocab_parallel`; with a tail bucket the factor of q_j is another one inside S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eaopd_megatron.objective.checks import Checks, require_integers, require_shape
from eaopd_megatron.objective.gradient import Recipe
from eaopd_megatron.objective.partial_stats import Evidence, KeptSet
from eaopd_megatron.objective.settings import Objective
from eaopd_megatron.objective.vocab_parallel import Shard, Softmax, times


@dataclass(frozen=True)
class Coefficients:
    """Factors of the gradient, [n] unless said. A term that the objective lacks is None (ratio: 0)."""

    kappa: Tensor
    token: Tensor | None = None  # c
    ratio: float = 0.0  # w_R, the exact reverse term
    teacher: Tensor | None = None  # w_p, the exact forward term
    target: Tensor | None = None  # [n, k], the top-k forward terms
    kappa_inside: Tensor | None = None  # factor of q_j inside S, the tail bucket


def gate_of(objective: Objective, entropy: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and whether it is ambiguous, [n], from a lower and an upper bound of the teacher's entropy."""
    certain = torch.zeros_like(entropy, dtype=torch.bool)
    if objective.gate in ("always", "never"):
        return torch.full_like(entropy, float(objective.gate == "always")), certain
    ambiguous = (entropy <= objective.threshold) & (upper > objective.threshold)
    if objective.gate == "hard":
        return (entropy > objective.threshold).to(entropy.dtype), ambiguous
    return torch.sigmoid((entropy - objective.threshold) / objective.gate_width), ambiguous


def sampled_reverse(
    objective: Objective, student_logprob: Tensor, teacher_logprob: Tensor, old_logprobs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's on-policy term -min(r A, clip(r) A); where the clip is active; r A, and 0 there. Each [n]."""
    old = student_logprob if old_logprobs is None else old_logprobs
    advantage = teacher_logprob - old
    ratio = (student_logprob - old).exp()
    low, high = 1 - objective.clip, 1 + objective.clip
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    unclipped = times(ratio, advantage)
    value = torch.where(clipped, times(ratio.clamp(low, high), advantage), unclipped)
    return -value, clipped, torch.where(clipped, 0.0, unclipped)


def top_k_forward(kept: KeptSet) -> tuple[Tensor, Tensor]:
    """KL over S of p renormalised, [n], and the renormalised p [n, k]."""
    log_p = kept.teacher_logprobs - kept.teacher_logprobs.logsumexp(1, keepdim=True)
    p = log_p.exp()
    return times(p, log_p - kept.student_logprobs).sum(1), p


def top_k_tail_forward(kept: KeptSet) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL over S and one bucket for the rest [n]; p [n, k]; all of p that counts, and p over q in the bucket [n]."""
    assert kept.teacher_rest is not None and kept.student_rest is not None
    p, rest = kept.teacher_logprobs.exp(), kept.teacher_rest
    value = times(p, kept.teacher_logprobs - kept.student_logprobs).sum(1)
    value = value + times(rest, rest.log() - kept.student_rest.log())
    return value, p, p.sum(1) + rest, times(rest, 1 / kept.student_rest)


@dataclass(frozen=True)
class Combined:
    """The loss of each token [n], its two divergences, and the gradient's coefficients."""

    loss: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    clipped: Tensor
    coefficients: Coefficients


def combine(
    objective: Objective,
    *,
    gate: Tensor,
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    old_logprobs: Tensor | None,
    student: Softmax,
    teacher: Softmax | None,
    gaps: tuple[Tensor, Tensor] | None,
    kept: KeptSet | None,
) -> Combined:
    """Loss and coefficients. teacher, gaps (G_s, G_t): where its whole distribution is known; kept: where S is."""
    loss, kappa, zero = torch.zeros_like(gate), torch.zeros_like(gate), torch.zeros_like(gate)
    clipped = torch.zeros_like(gate, dtype=torch.bool)
    token: Tensor | None = None
    on_teacher: Tensor | None = None
    target: Tensor | None = None
    inside: Tensor | None = None
    ratio = 0.0

    reverse_kl = student_logprob - teacher_logprob
    if teacher is not None and gaps is not None:
        reverse_kl = gaps[0] / student.total - (student.total / teacher.total).log()
    if objective.reverse_kl == "sampled":
        value, clipped, c = sampled_reverse(objective, student_logprob, teacher_logprob, old_logprobs)
        if objective.has_reverse:
            loss = objective.reverse_weight * value
            kappa = token = objective.reverse_weight * c
    elif objective.has_reverse:
        assert gaps is not None
        ratio = objective.reverse_weight
        loss = objective.reverse_weight * reverse_kl
        kappa = -objective.reverse_weight * gaps[0] / student.total  # q_j (D_j - its mean under q)

    weight = objective.forward_weight * gate if objective.has_forward else zero
    if objective.forward_kl == "topk_tail":
        assert kept is not None
        forward_kl, p, whole, rest_ratio = top_k_tail_forward(kept)
        if objective.has_forward:
            target = weight[:, None] * p
            inside = kappa + weight * whole
            kappa = kappa + weight * whole - times(weight, rest_ratio)
    elif kept is not None:
        forward_kl, p = top_k_forward(kept)
        if objective.has_forward:
            target = weight[:, None] * p
            kappa = kappa + weight
    else:
        assert teacher is not None and gaps is not None
        forward_kl = (student.total / teacher.total).log() - gaps[1] / teacher.total
        if objective.has_forward:
            on_teacher = weight
            kappa = kappa + weight
    if objective.has_forward:
        loss = loss + times(weight, forward_kl)
    coefficients = Coefficients(kappa, token=token, ratio=ratio, teacher=on_teacher, target=target, kappa_inside=inside)
    return Combined(loss, reverse_kl, forward_kl, clipped, coefficients)


@dataclass(frozen=True)
class TokenLosses:
    """Each [n] and the same on every rank. ``loss`` carries the gradient, the rest is detached. Entropies, KLs: nats.

    reverse_kl is exact where the teacher's whole distribution is given, else the sampled estimate log q(y) - log p(y).
    forward_kl is the objective's; where it has none, the exact one if the teacher's whole distribution is given, else
    the top-k one. teacher_entropy is the lower bound where only top-k log-probs without an entropy are given;
    gate_ambiguous (bool) says that the bounds leave a hard gate open to doubt. clipped (bool): the ratio's clip stops
    the gradient.
    """

    loss: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    gate: Tensor
    gate_ambiguous: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """log q(y) and the entropy of each token, [n] nats, the same on every rank."""

    logprob: Tensor
    entropy: Tensor


def check_tokens(checks: Checks, count: int, vocab_size: int, **ids: Tensor | None) -> None:
    """Refuse ids [count] of another kind or shape, and those outside the vocabulary."""
    for name, value in ids.items():
        if value is not None:
            require_integers(name, value)
            require_shape(name, value, (count,), "the student has rows")
            checks.refuse_ids(name, value, vocab_size)


def check_old_logprobs(checks: Checks, count: int, old_logprobs: Tensor | None) -> None:
    """Refuse old log-probs of another shape, and such that are none."""
    if old_logprobs is not None:
        require_shape("old_logprobs", old_logprobs, (count,), "the student has rows")
        checks.refuse_logprobs("old_logprobs", old_logprobs)


def judge(
    objective: Objective, seen: Evidence, shard: Shard, tokens: Tensor, old_logprobs: Tensor | None, *, careful: bool
) -> tuple[TokenLosses, Recipe]:
    """Losses that carry no gradient yet, and the recipe of that gradient. careful: the logits hold -inf."""
    gate, ambiguous = gate_of(objective, seen.teacher_entropy, seen.entropy_upper)
    combined = combine(
        objective,
        gate=gate,
        student_logprob=seen.student_logprob,
        teacher_logprob=seen.teacher_logprob,
        old_logprobs=None if old_logprobs is None else old_logprobs.detach().to(gate.dtype),
        student=seen.student,
        teacher=seen.teacher,
        gaps=seen.gaps,
        kept=seen.kept,
    )
    recipe = Recipe(
        shard=shard,
        student=seen.student,
        teacher=seen.teacher,
        coefficients=combined.coefficients,
        tokens=tokens,
        kept_ids=None if seen.kept is None else seen.kept.ids,
        careful=careful,
    )
    losses = TokenLosses(
        loss=combined.loss,
        teacher_entropy=seen.teacher_entropy,
        student_entropy=seen.student.entropy,
        forward_kl=combined.forward_kl,
        reverse_kl=combined.reverse_kl,
        gate=gate,
        gate_ambiguous=ambiguous,
        student_logprob=seen.student_logprob,
        teacher_logprob=seen.teacher_logprob,
        clipped=combined.clipped,
    )
    return losses, recipe
