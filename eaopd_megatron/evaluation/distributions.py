"""How a student's next-token distributions lie to its teacher's, and to its own before training, on the same states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Sums = dict[str, tuple[float, int]]
"""Figure → sum over its tokens, and their number."""


def compare(student: Tensor, teacher: Tensor, before: Tensor | None, threshold: float) -> Sums:
    """Sums over n states; logits [n, V] of each model, `before` of the student before training.

    high_entropy_student, high_entropy_teacher: states with more than `threshold` nats. forward_kl_gated: KL(teacher ‖
    student), nats, over states of high teacher entropy. top1_teacher: states where the two have another most probable
    token; top1_changed: where training changed the student's.
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


def means(parts: Iterable[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over all tokens of all parts; NaN for a figure without any."""
    totals: dict[str, tuple[float, int]] = {}
    for part in parts:
        for name, (value, count) in part.items():
            sum_, number = totals.get(name, (0.0, 0))
            totals[name] = (sum_ + value, number + count)
    return {name: value / count if count else float("nan") for name, (value, count) in totals.items()}


def response_logits(model: torch.nn.Module, prompt: list[int], response: list[int], vocab_size: int) -> Tensor:
    """[len(response), vocab_size]: what a transformers model says before each response token, of the first ids."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt + response], device=device)).logits[0]
    return logits[len(prompt) - 1 : -1, :vocab_size]
