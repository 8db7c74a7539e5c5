"""Loss of a token and its gradient's coefficients, from numbers that every rank holds: no vocabulary, no collective.

The gradient over the student's logits is, for q and p the student's and the teacher's probabilities,

    q_j (kappa + w_R D_j) - w_p p_j - sum over i of target_i 1[j = S_i] - c 1[j = y]

with the gap D of `vocab_parallel`; with a tail bucket the factor of q_j is another one inside S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .settings import Objective
from .vocab_parallel import Softmax, times


@dataclass(frozen=True)
class KeptSet:
    """The teacher's top-k set S: ids, log p and log q [n, k]; with a tail bucket the probabilities outside S [n]."""

    ids: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    teacher_rest: Tensor | None = None
    student_rest: Tensor | None = None


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
