"""Each term of the loss, its value beside its gradient, from statistics that every rank holds: no collective.

Notation: q, p the student's and the teacher's softmax, y the sampled token, pi_old(y) its old probability, H the
teacher's entropy, S the teacher's top-k set, D_j = (s_j - m_s) - (t_j - m_t). The gradient over the student's logits is

    q_j (kappa + w_R D_j)  -  w_p p_j  -  sum_i target_i 1[j = S_i]  -  c 1[j = y]

where, with a tail bucket, ids in S have a kappa of their own. Every term adds to these coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eaopd_megatron.objective.partial_stats import ReducedStats, TopKSet
from eaopd_megatron.objective.settings import Objective
from eaopd_megatron.objective.vocab_parallel import zero_safe_mul


@dataclass(frozen=True)
class TokenLosses:
    """Losses and statistics per token, each [tokens] and equal on every rank. Only `loss` carries a gradient.

    loss              w_R R + w_F g F
    teacher_entropy   H, nats; its lower bound if only top-k log-probs without an entropy are known
    student_entropy   nats
    forward_kl        F, nats; without a forward term KL(p || q), or the top-k one if p is known on S alone
    reverse_kl        KL(q || p), nats, if p is known on the whole vocabulary; else the estimate log q(y) - log p(y)
    gate              g
    gate_ambiguous    bool: the threshold lies between the bounds of H
    student_logprob   log q(y), nats
    teacher_logprob   log p(y), nats
    clipped           bool: the clip of the ratio stops the gradient
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
    """log q(y) and the student's entropy, each [tokens] in nats, equal on every rank."""

    logprob: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of the gradient, [tokens] unless noted; None (reverse: 0) where no term needs them."""

    kappa: Tensor
    token: Tensor | None = None  # c, of the sampled reverse term
    reverse: float = 0.0  # w_R, of the exact reverse term
    forward: Tensor | None = None  # w_p = w_F g, of the exact forward term
    target: Tensor | None = None  # [tokens, k], of the top-k forward terms
    topk_ids: Tensor | None = None  # [tokens, k], ids of S
    top_k_kappa: Tensor | None = None  # kappa inside S, of the tail bucket


def compute_token_losses(
    objective: Objective, stats: ReducedStats, old_logprobs: Tensor | None
) -> tuple[TokenLosses, Coefficients]:
    """Return the losses, which carry no gradient yet, and the coefficients of their gradient."""
    gate, gate_ambiguous = compute_gate(objective, stats.teacher_entropy, stats.teacher_entropy_upper)
    loss = zero = torch.zeros_like(gate)
    clipped, coefficients = torch.zeros_like(gate, dtype=torch.bool), Coefficients(zero)
    reverse_kl = stats.student_logprob - stats.teacher_logprob
    if stats.teacher is not None:
        reverse_kl = _exact_reverse_kl(stats)
    w_r = objective.reverse_weight
    if objective.reverse_kl == "sampled":
        opd, c, clipped = _sampled_reverse_term(objective.clip, stats, old_logprobs)
        if objective.has_reverse:
            loss, c = w_r * opd, w_r * c
            coefficients = Coefficients(kappa=c, token=c)
    elif objective.has_reverse:
        loss, coefficients = w_r * reverse_kl, _exact_reverse_coefficients(w_r, stats)

    weight = objective.forward_weight * gate if objective.has_forward else zero  # w_F g
    if objective.forward_kl == "topk_tail":
        forward_kl, with_forward = _top_k_tail_forward_term(weight, stats, coefficients)
    elif stats.top_k is not None:
        forward_kl, with_forward = _top_k_forward_term(weight, stats.top_k, coefficients)
    else:
        forward_kl, with_forward = _exact_forward_term(weight, stats, coefficients)
    if objective.has_forward:
        loss, coefficients = loss + zero_safe_mul(weight, forward_kl), with_forward
    losses = TokenLosses(
        loss=loss,
        teacher_entropy=stats.teacher_entropy,
        student_entropy=stats.student.entropy,
        forward_kl=forward_kl,
        reverse_kl=reverse_kl,
        gate=gate,
        gate_ambiguous=gate_ambiguous,
        student_logprob=stats.student_logprob,
        teacher_logprob=stats.teacher_logprob,
        clipped=clipped,
    )
    return losses, coefficients


def compute_gate(objective: Objective, entropy: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gate g(H) and whether it is ambiguous, [tokens], from a lower and an upper bound of H (nats)."""
    certain = torch.zeros_like(entropy, dtype=torch.bool)
    if objective.gate in ("always", "never"):
        return torch.full_like(entropy, float(objective.gate == "always")), certain
    ambiguous = (entropy <= objective.threshold) & (upper > objective.threshold)
    if objective.gate == "hard":
        return (entropy > objective.threshold).to(entropy.dtype), ambiguous
    return torch.sigmoid((entropy - objective.threshold) / objective.gate_width), ambiguous


def _sampled_reverse_term(
    clip: float, stats: ReducedStats, old_logprobs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the on-policy term -min(r A, clip(r, 1 - eps, 1 + eps) A), c, and where the clip is active.

    A = log p(y) - log pi_old(y), r = q(y) / pi_old(y). Gradient: c (q_j - 1[j = y]) with c = r A, or 0 where clipped.
    """
    dtype = stats.student_logprob.dtype
    old = stats.student_logprob if old_logprobs is None else old_logprobs.detach().to(dtype)
    advantage = stats.teacher_logprob - old
    ratio = (stats.student_logprob - old).exp()
    low, high = 1 - clip, 1 + clip
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    unclipped = zero_safe_mul(ratio, advantage)
    value = torch.where(clipped, zero_safe_mul(ratio.clamp(low, high), advantage), unclipped)
    return -value, torch.where(clipped, 0.0, unclipped), clipped


def _exact_reverse_kl(stats: ReducedStats) -> Tensor:
    """Return KL(q || p) = G_s / Z_s - log(Z_s / Z_t)."""
    assert stats.teacher is not None and stats.gaps is not None
    return stats.gaps[0] / stats.student.sum_exp - (stats.student.sum_exp / stats.teacher.sum_exp).log()


def _exact_reverse_coefficients(weight: float, stats: ReducedStats) -> Coefficients:
    """Gradient of w_R KL(q || p): w_R q_j (D_j - E_q[D]) with E_q[D] = G_s / Z_s."""
    assert stats.gaps is not None
    return Coefficients(kappa=-weight * stats.gaps[0] / stats.student.sum_exp, reverse=weight)


def _exact_forward_term(weight: Tensor, stats: ReducedStats, reverse: Coefficients) -> tuple[Tensor, Coefficients]:
    """KL(p || q) = log(Z_s / Z_t) - G_t / Z_t. Gradient: q_j - p_j, weighted and added to the reverse term's."""
    assert stats.teacher is not None and stats.gaps is not None
    kl = (stats.student.sum_exp / stats.teacher.sum_exp).log() - stats.gaps[1] / stats.teacher.sum_exp
    return kl, replace(reverse, kappa=reverse.kappa + weight, forward=weight)


def _top_k_forward_term(weight: Tensor, top_k: TopKSet, reverse: Coefficients) -> tuple[Tensor, Coefficients]:
    """KL(p~ || q) over S, p~ = p renormalised over S (the paper). Gradient: q_j - p~_j 1[j in S]."""
    log_p = top_k.teacher_logprobs - top_k.teacher_logprobs.logsumexp(1, keepdim=True)
    p = log_p.exp()
    kl = zero_safe_mul(p, log_p - top_k.student_logprobs).sum(1)
    return kl, replace(reverse, kappa=reverse.kappa + weight, target=weight[:, None] * p, topk_ids=top_k.ids)


def _top_k_tail_forward_term(weight: Tensor, stats: ReducedStats, reverse: Coefficients) -> tuple[Tensor, Coefficients]:
    """KL(p || q) over k + 1 symbols: the ids in S, and one bucket for the rest with mass r_p and r_q.

    With M = sum_S p + r_p, the gradient is M q_j - p_j inside S and q_j (M - r_p / r_q) outside.
    """
    top_k = stats.top_k
    assert top_k is not None and top_k.teacher_tail is not None and top_k.student_tail is not None
    p, rest = top_k.teacher_logprobs.exp(), top_k.teacher_tail
    kl = zero_safe_mul(p, top_k.teacher_logprobs - top_k.student_logprobs).sum(1)
    kl = kl + zero_safe_mul(rest, rest.log() - top_k.student_tail.log())
    inside = reverse.kappa + weight * (p.sum(1) + rest)
    outside = inside - zero_safe_mul(weight, zero_safe_mul(rest, 1 / top_k.student_tail))
    return kl, replace(reverse, kappa=outside, target=weight[:, None] * p, topk_ids=top_k.ids, top_k_kappa=inside)
