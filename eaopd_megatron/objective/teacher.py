"""What a teacher says about each token, and what can be known of its entropy from top-k log-probs alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective.checks import Checks, require_integers, require_shape
from eaopd_megatron.objective.top_k import first_k, shard_top_k
from eaopd_megatron.objective.vocab_parallel import Shard, look_up, merge, partial_sums, times


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits in the student's shard layout: [n, columns of this rank]. Serves every objective."""

    logits: Tensor


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher's final hidden states, [n, its own width], and this rank's rows of its output head in the student's
    vocabulary layout, [columns, its own width]. Serves every objective; its logits are made where they are needed.
    """

    hidden: Tensor
    head_weight: Tensor


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

    With h = -sum p log p over the k, r = max(0, 1 - sum p) and p_(k) the smallest of the k, the missing probabilities
    are
    at most p_(k) each, and at most vocab_size - k of them share r:

        h - r log p_(k)  <=  H  <=  h + r log((vocab_size - k) / r)
    """
    k = logprobs.shape[1]
    p = logprobs.exp()
    h = -times(p, logprobs).sum(1)
    if k >= vocab_size:
        return h, h
    rest = (1 - p.sum(1)).clamp_min(0)
    upper = h + times(rest, ((vocab_size - k) / rest).log())
    lower = h - times(rest, logprobs.amin(1))
    # Rounding can leave a rest that the smallest probability has no room for (p_(k) = 0): the upper bound still holds.
    return torch.minimum(lower, upper), upper


@torch.no_grad()
def summarise_teacher(
    logits: Tensor,
    tokens: Tensor,
    *,
    k: int,
    vocab_size: int,
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    teacher_tokens: Tensor | None = None,
) -> TeacherTopK:
    """The teacher's top-k, entropy and log p(y) from its sharded logits, the same on every rank. One collective.

    logits: [n, columns of this rank], unchanged. tokens: [n] ids of the sampled tokens; teacher_tokens: [n] ids under
    which log p(y) is looked up, where they differ. k: ids a token (all of them when the vocabulary is smaller). Raises
    ValueError naming argument and row for shapes that disagree, ids outside the vocabulary and NaN logits.
    """
    if k < 1:
        raise ValueError(f"k: {k} is not at least 1")
    shard = Shard.of("logits", logits, vocab_size, group, chunk)
    n, k = logits.shape[0], min(k, vocab_size)
    checks = Checks()
    for name, ids in (("tokens", tokens), ("teacher_tokens", teacher_tokens)):
        if ids is not None:
            require_integers(name, ids)
            require_shape(name, ids, (n,), "logits have rows")
            checks.refuse_ids(name, ids, vocab_size)
    checks.run()
    asked = (tokens if teacher_tokens is None else teacher_tokens).long()[:, None]
    logits = logits.detach()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    ids, values = shard_top_k(logits, shard, k)
    parts = shard.exchange(
        {
            "sums": partial_sums(logits, None, shard, dtype=dtype)[0]["student"],
            "token": look_up(logits, shard, asked, dtype),
            "ids": ids.T.to(dtype),
            "values": values.T.to(dtype),
        }
    )
    softmax = merge(parts["sums"])[0]
    checks.refuse_broken("logits", softmax.broken)
    checks.run()
    candidates, values = (parts[name].permute(2, 0, 1).flatten(1) for name in ("ids", "values"))
    best = first_k(values, candidates, k)
    return TeacherTopK(
        ids=candidates.gather(1, best).long(),
        logprobs=softmax.logprob(values.gather(1, best).T).T.contiguous(),
        token_logprob=softmax.logprob(parts["token"].sum(0))[0],
        entropy=softmax.entropy,
    )
