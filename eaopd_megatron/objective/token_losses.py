"""Each term of the loss, its value beside its gradient, from statistics that every rank holds: no collective.

Notation: q, p the student's and the teacher's softmax, y the sampled token, pi_old(y) its old probability, H the
teacher's entropy, S the teacher's top-k set, D_j = (s_j - m_s) - (t_j - m_t). The gradient over the student's logits is

    q_j (kappa + w_R D_j)  -  w_p p_j  -  sum_i target_i 1[j = S_i]  -  c 1[j = y]

where, with a tail bucket, ids in S have a kappa of their own. Every term adds to these coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    top_k_kappa: Tensor | None = None  # kappa inside S, of the tail bucket


def compute_token_losses(
    objective: Objective, stats: ReducedStats, old_logprobs: Tensor | None
) -> tuple[TokenLosses, Coefficients]:
    """Return the losses, which carry no gradient yet, and the coefficients of their gradient."""
    gate, gate_ambiguous = compute_gate(objective, stats.teacher_entropy, stats.teacher_entropy_upper)
    zero = torch.zeros_like(gate)
    reverse = _ReverseTerm(zero, zero, torch.zeros_like(gate, dtype=torch.bool))
    reverse_kl = stats.student_logprob - stats.teacher_logprob
    if stats.teacher is not None:
        reverse_kl = _exact_reverse_kl(stats)
    if objective.reverse_kl == "sampled":
        reverse = _sampled_reverse_term(objective, stats, old_logprobs, zero)
    elif objective.has_reverse:
        reverse = _exact_reverse_term(objective.reverse_weight, stats, reverse_kl)

    weight = objective.forward_weight * gate if objective.has_forward else zero
    if objective.forward_kl == "topk_tail":
        assert stats.top_k is not None
        forward = _top_k_tail_forward_term(weight, stats.top_k, reverse.kappa)
    elif stats.top_k is not None:
        forward = _top_k_forward_term(weight, stats.top_k, reverse.kappa)
    else:
        forward = _exact_forward_term(weight, stats, reverse.kappa)

    loss, kappa = reverse.loss, reverse.kappa
    target = teacher = top_k_kappa = None
    if objective.has_forward:
        loss, kappa = loss + zero_safe_mul(weight, forward.kl), forward.kappa
        target, teacher, top_k_kappa = forward.target, forward.teacher, forward.top_k_kappa
    losses = TokenLosses(
        loss=loss,
        teacher_entropy=stats.teacher_entropy,
        student_entropy=stats.student.entropy,
        forward_kl=forward.kl,
        reverse_kl=reverse_kl,
        gate=gate,
        gate_ambiguous=gate_ambiguous,
        student_logprob=stats.student_logprob,
        teacher_logprob=stats.teacher_logprob,
        clipped=reverse.clipped,
    )
    coefficients = Coefficients(
        kappa, token=reverse.token, reverse=reverse.weight, forward=teacher, target=target, top_k_kappa=top_k_kappa
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


@dataclass(frozen=True)
class _ReverseTerm:
    """The weighted reverse term and its coefficients."""

    loss: Tensor
    kappa: Tensor
    clipped: Tensor
    token: Tensor | None = None
    weight: float = 0.0  # w_R of the exact term


def _sampled_reverse_term(
    objective: Objective, stats: ReducedStats, old_logprobs: Tensor | None, zero: Tensor
) -> _ReverseTerm:
    """The on-policy term -min(r A, clip(r, 1 - eps, 1 + eps) A), A = log p(y) - log pi_old(y), r = q(y) / pi_old(y).

    Gradient: c (q_j - 1[j = y]) with c = r A where the clip is inactive, else 0.
    """
    old = stats.student_logprob if old_logprobs is None else old_logprobs.detach().to(zero.dtype)
    advantage = stats.teacher_logprob - old
    ratio = (stats.student_logprob - old).exp()
    low, high = 1 - objective.clip, 1 + objective.clip
    clipped = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    unclipped = zero_safe_mul(ratio, advantage)
    value = torch.where(clipped, zero_safe_mul(ratio.clamp(low, high), advantage), unclipped)
    if not objective.has_reverse:
        return _ReverseTerm(zero, zero, clipped)
    c = objective.reverse_weight * torch.where(clipped, 0.0, unclipped)
    return _ReverseTerm(objective.reverse_weight * -value, kappa=c, clipped=clipped, token=c)


def _exact_reverse_kl(stats: ReducedStats) -> Tensor:
    """Return KL(q || p) = G_s / Z_s - log(Z_s / Z_t)."""
    assert stats.teacher is not None and stats.gaps is not None
    return stats.gaps[0] / stats.student.sum_exp - (stats.student.sum_exp / stats.teacher.sum_exp).log()


def _exact_reverse_term(weight: float, stats: ReducedStats, reverse_kl: Tensor) -> _ReverseTerm:
    """The exact reverse term w_R KL(q || p). Gradient: w_R q_j (D_j - G_s / Z_s), where G_s / Z_s = E_q[D]."""
    assert stats.gaps is not None
    kappa = -weight * stats.gaps[0] / stats.student.sum_exp
    return _ReverseTerm(weight * reverse_kl, kappa, torch.zeros_like(kappa, dtype=torch.bool), weight=weight)


@dataclass(frozen=True)
class _ForwardTerm:
    """A forward divergence (nats) and the coefficients of weight * divergence, added to the reverse term's kappa."""

    kl: Tensor
    kappa: Tensor
    teacher: Tensor | None = None  # w_p
    target: Tensor | None = None  # [tokens, k]
    top_k_kappa: Tensor | None = None


def _exact_forward_term(weight: Tensor, stats: ReducedStats, kappa: Tensor) -> _ForwardTerm:
    """KL(p || q) = log(Z_s / Z_t) - G_t / Z_t. Gradient: q_j - p_j."""
    assert stats.teacher is not None and stats.gaps is not None
    kl = (stats.student.sum_exp / stats.teacher.sum_exp).log() - stats.gaps[1] / stats.teacher.sum_exp
    return _ForwardTerm(kl, kappa + weight, teacher=weight)


def _top_k_forward_term(weight: Tensor, top_k: TopKSet, kappa: Tensor) -> _ForwardTerm:
    """KL(p~ || q) over S, p~ = p renormalised over S (the paper). Gradient: q_j - p~_j 1[j in S]."""
    log_p = top_k.teacher_logprobs - top_k.teacher_logprobs.logsumexp(1, keepdim=True)
    p = log_p.exp()
    kl = zero_safe_mul(p, log_p - top_k.student_logprobs).sum(1)
    return _ForwardTerm(kl, kappa + weight, target=weight[:, None] * p)


def _top_k_tail_forward_term(weight: Tensor, top_k: TopKSet, kappa: Tensor) -> _ForwardTerm:
    """KL(p || q) over k + 1 symbols: the ids in S, and one bucket for the rest with mass r_p and r_q.

    With M = sum_S p + r_p, the gradient is M q_j - p_j inside S and q_j (M - r_p / r_q) outside.
    """
    assert top_k.teacher_tail is not None and top_k.student_tail is not None
    p, rest = top_k.teacher_logprobs.exp(), top_k.teacher_tail
    kl = zero_safe_mul(p, top_k.teacher_logprobs - top_k.student_logprobs).sum(1)
    kl = kl + zero_safe_mul(rest, rest.log() - top_k.student_tail.log())
    inside = kappa + weight * (p.sum(1) + rest)
    outside = inside - zero_safe_mul(weight, zero_safe_mul(rest, 1 / top_k.student_tail))
    return _ForwardTerm(kl, outside, target=weight[:, None] * p, top_k_kappa=inside)
