"""What a teacher says about each token, and what can be known of its entropy from top-k log-probs alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits in the student's shard layout: [n, columns of this rank]. Serves every objective."""

    logits: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's most probable ids of each token, on every rank alike. Cannot serve an exact term.

    ids             [n, k] int64, ids of the whole vocabulary, most probable first (larger logit, then lower id)
    logprobs        [n, k] nats, normalised over the whole vocabulary
    token_logprob   [n] nats, log p(y) of the sampled token (under the mapped id where a terminal map applies)
    entropy         [n] nats over the whole vocabulary; None when unknown: the gate is then made from bounds
    """

    ids: Tensor
    logprobs: Tensor
    token_logprob: Tensor
    entropy: Tensor | None = None


def entropy_bounds(logprobs: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Lower and upper bound, [n] nats, of the entropy of a distribution whose k largest log-probs are known, [n, k].

    With h = -sum p log p over the k, r = max(0, 1 - sum p) and p_(k) the smallest of the k, the missing probabilities are
    at most p_(k) each, and at most vocab_size - k of them share r:  h - r log p_(k) <= H <= h + r log((vocab_size - k) / r).
    """
    k = logprobs.shape[1]
    p = logprobs.exp()
    h = -times(p, logprobs).sum(1)
    if k >= vocab_size:
        return h, h
    rest = (1 - p.sum(1)).clamp_min(0)
    upper = h + times(rest, (vocab_size - k) / rest, log=True)
    lower = h - times(rest, logprobs.amin(1))
    # Rounding can leave a rest that the smallest probability has no room for (p_(k) = 0): the upper bound still holds.
    return torch.minimum(lower, upper), upper


def times(weight: Tensor, value: Tensor, *, log: bool = False) -> Tensor:
    """weight · value, or weight · log(value), with 0 · (anything) = 0."""
    return torch.where(weight == 0, 0.0, weight * (value.log() if log else value))
