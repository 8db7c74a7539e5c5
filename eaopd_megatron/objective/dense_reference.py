"""The objective in plain PyTorch over the whole vocabulary on one rank, for autograd: hold it against the paper.

It shares no arithmetic with the rest of the package and is the oracle of its tests. Use it in fp64; it stores
everything.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from eaopd_megatron.objective.settings import Objective
from eaopd_megatron.objective.teacher import TeacherLogits, TeacherTopK


def dense_loss(
    student_logits: Tensor,  # [n, at least vocab_size], columns beyond vocab_size are padding
    teacher: TeacherLogits | TeacherTopK,
    tokens: Tensor,  # [n]
    old_logprobs: Tensor | None = None,  # [n]
    *,
    teacher_tokens: Tensor | None = None,  # [n]
    objective: Objective,
    vocab_size: int,
) -> SimpleNamespace:
    """The fields of `TokenLosses`, each [n]; loss and both divergences carry autograd's gradient."""
    o, V = objective, vocab_size
    log_q = student_logits[:, :V].log_softmax(1)
    log_q_y = log_q.gather(1, tokens[:, None])[:, 0]
    student_entropy = -(log_q.exp() * log_q).sum(1)
    if isinstance(teacher, TeacherLogits):
        log_p = teacher.logits[:, :V].to(log_q.dtype).log_softmax(1)
        log_p_y = log_p.gather(1, (tokens if teacher_tokens is None else teacher_tokens)[:, None])[:, 0]
        S = teacher.logits[:, :V].sort(dim=1, descending=True, stable=True).indices[:, : o.top_k]
        log_p_S, rest_p = log_p.gather(1, S), log_p.exp().scatter(1, S, 0).sum(1)
        entropy = upper = -torch.xlogy(log_p.exp(), log_p.exp()).sum(1)
        reverse_kl = (log_q.exp() * (log_q - log_p)).sum(1)
        forward_exact = (torch.xlogy(log_p.exp(), log_p.exp()) - log_p.exp() * log_q).sum(1)
    else:
        S, log_p_S, log_p_y = teacher.ids[:, : o.top_k], teacher.logprobs[:, : o.top_k], teacher.token_logprob
        rest_p = (1 - log_p_S.exp().sum(1)).clamp_min(0)
        h = -torch.xlogy(log_p_S.exp(), log_p_S.exp()).sum(1)
        entropy = h - rest_p * log_p_S.amin(1) if teacher.entropy is None else teacher.entropy
        upper = h + torch.xlogy(rest_p, (V - S.shape[1]) / rest_p) if teacher.entropy is None else teacher.entropy
        reverse_kl = log_q_y - log_p_y

    # the on-policy term
    old = log_q_y.detach() if old_logprobs is None else old_logprobs
    ratio, advantage = (log_q_y - old).exp(), log_p_y - old
    opd = -torch.minimum(ratio * advantage, ratio.clamp(1 - o.clip, 1 + o.clip) * advantage)
    reverse = {"sampled": opd, "exact": reverse_kl, "none": 0 * opd}[o.reverse_kl]

    # the forward term
    log_q_S, p_S = log_q.gather(1, S), log_p_S.exp()
    p_bar = log_p_S.softmax(1)
    rest_q = log_q.exp().scatter(1, S, 0).sum(1)
    topk = (torch.xlogy(p_bar, p_bar) - p_bar * log_q_S).sum(1)
    bucket = torch.xlogy(rest_p, rest_p) - torch.xlogy(rest_p, rest_q)
    tail = (torch.xlogy(p_S, p_S) - p_S * log_q_S).sum(1) + (bucket if S.shape[1] < V else 0)
    exact = forward_exact if isinstance(teacher, TeacherLogits) else topk
    forward = {"topk": topk, "topk_tail": tail, "exact": exact, "none": exact}[o.forward_kl]

    # the gate and the sum
    hard, soft = (entropy > o.threshold).to(entropy), torch.sigmoid((entropy - o.threshold) / o.gate_width)
    gate = {"hard": hard, "soft": soft, "always": torch.ones_like(hard), "never": torch.zeros_like(hard)}[o.gate]
    alpha = 0.0 if o.forward_kl == "none" else o.forward_weight
    return SimpleNamespace(
        loss=o.reverse_weight * reverse + alpha * gate * forward,
        forward_kl=forward,
        reverse_kl=reverse_kl,
        gate=gate,
        gate_ambiguous=(entropy <= o.threshold) & (upper > o.threshold) & (o.gate in ("hard", "soft")),
        teacher_entropy=entropy,
        student_entropy=student_entropy,
        student_logprob=log_q_y,
        teacher_logprob=log_p_y,
        clipped=(opd > -ratio * advantage) & (o.reverse_kl == "sampled"),
    )
