"""Drawing tokens from full logits."""

from __future__ import annotations

import torch


def draw(logprobs: torch.Tensor, uniform: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Inverse-CDF sampling: token ids [b] of log-probs [b, V] (nats, normalised) with uniform [b] fp64 in [0, 1).

    top_p keeps the smallest set of most probable tokens whose probability reaches it. temperature 0 is greedy.
    fp64 sums: over 151,936 tokens an fp32 cumulative sum would misplace the last digits of the distribution.
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    probs = torch.softmax(logprobs.double() / temperature, -1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    cumulative = probs.cumsum(-1)
    target = uniform.to(probs.device)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    # rounding at the very top must not draw a token of probability zero
    last_possible = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(tokens, last_possible)
