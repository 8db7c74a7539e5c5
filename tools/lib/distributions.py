"""Compares a student's next-token distributions with its teacher's and with its own before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Sums = dict[str, tuple[float, int]]
"""Figure -> (sum over its tokens, number of tokens)."""


def compare_logits(student: Tensor, teacher: Tensor, before: Tensor | None, threshold: float) -> Sums:
    """Sum each figure over n states. Logits are [n, V]; `before` are the student's before training.

    high_entropy_student, high_entropy_teacher: states with an entropy above `threshold` nats. forward_kl_gated:
    KL(teacher ‖ student) in nats, over states of high teacher entropy. top1_teacher: states where the two have
    different most probable tokens; top1_changed: states where training changed the student's.
    """
    log_q, log_p = (logits.float().log_softmax(-1) for logits in (student, teacher))
    entropy_q, entropy_p = (-(values.exp() * values).sum(-1) for values in (log_q, log_p))
    gated = entropy_p > threshold
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    flags = {
        "high_entropy_student": entropy_q > threshold,
        "high_entropy_teacher": gated,
        "top1_teacher": log_q.argmax(-1) != log_p.argmax(-1),
    }
    if before is not None:
        flags["top1_changed"] = log_q.argmax(-1) != before.argmax(-1)
    sums = {name: (float(values.sum()), values.numel()) for name, values in flags.items()}
    return {**sums, "forward_kl_gated": (float(kl[gated].sum()), int(gated.sum()))}


def token_means(parts: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Return each figure's mean over the tokens of all parts; NaN for a figure without tokens."""
    totals: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            total, tokens = totals.get(name, (0.0, 0))
            totals[name] = (total + value, tokens + count)
    return {name: value / count if count else float("nan") for name, (value, count) in totals.items()}


def response_logits(model: torch.nn.Module, prompt: list[int], response: list[int], vocab_size: int) -> Tensor:
    """Return a transformers model's logits [len(response), vocab_size] that predict each response token."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt + response], device=device)).logits[0]
    return logits[len(prompt) - 1 : -1, :vocab_size]
