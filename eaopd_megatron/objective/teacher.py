"""The teacher's signal per token, and bounds of its entropy from top-k log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective.checks import InputChecks, require_integers, require_shape
from eaopd_megatron.objective.settings import Objective
from eaopd_megatron.objective.vocab_parallel import (
    VocabShard,
    gather_local_logits,
    merge_softmax,
    partial_sums,
    shard_top_k,
    top_k_positions,
    zero_safe_mul,
)


@dataclass(frozen=True)
class TeacherLogits:
    """The teacher's logits [tokens, vocab/tp], sharded as the student's. Serves every objective."""

    logits: Tensor


@dataclass(frozen=True)
class TeacherHidden:
    """The teacher's final hidden states and output head; logits are computed tile by tile. Serves every objective.

    hidden          [tokens, teacher's hidden size]
    head_weight     [vocab/tp, teacher's hidden size], sharded as the student's output head
    """

    hidden: Tensor
    head_weight: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """The teacher's k most probable ids of each token, replicated on every rank. Cannot serve an exact term.

    ids             [tokens, k] int64 vocabulary ids, most probable first (larger logit, then lower id)
    logprobs        [tokens, k] nats, normalised over the whole vocabulary
    token_logprob   [tokens] nats, log p(y) of the sampled token (of the mapped id where an EOS map applies)
    entropy         [tokens] nats, over the whole vocabulary; None: the gate uses `entropy_bounds`
    """

    ids: Tensor
    logprobs: Tensor
    token_logprob: Tensor
    entropy: Tensor | None = None


def check_teacher_top_k(
    teacher: TeacherTopK, num_tokens: int, objective: Objective, vocab_size: int, checks: InputChecks
) -> None:
    """Refuse top-k log-probs of another shape, fewer than the objective's top_k, or invalid ones."""
    require_integers("teacher.ids", teacher.ids)
    require_shape("teacher.ids", teacher.ids, (num_tokens, None), "the student has rows")
    k = teacher.ids.shape[1]
    required = min(objective.top_k, vocab_size) if objective.has_forward else 1
    if k < required:
        raise ValueError(f"teacher.ids: {k} columns, the objective wants top_k={required}")
    require_shape("teacher.logprobs", teacher.logprobs, (num_tokens, k), "teacher.ids has")
    require_shape("teacher.token_logprob", teacher.token_logprob, (num_tokens,), "the student has rows")
    checks.refuse_top_k(teacher.logprobs, teacher.ids, vocab_size)
    checks.refuse_logprobs("teacher.token_logprob", teacher.token_logprob)
    if teacher.entropy is not None:
        require_shape("teacher.entropy", teacher.entropy, (num_tokens,), "the student has rows")
        checks.refuse_entropy("teacher.entropy", teacher.entropy)


def entropy_bounds(logprobs: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return a lower and an upper bound [tokens] (nats) of the entropy H, given the k largest log-probs [tokens, k].

    With h = -sum p log p over the k, r = max(0, 1 - sum p) and p_(k) the smallest of the k: at most vocab_size - k
    further probabilities, each at most p_(k), share r, so

        h - r log p_(k)  <=  H  <=  h + r log((vocab_size - k) / r)
    """
    k = logprobs.shape[1]
    p = logprobs.exp()
    h = -zero_safe_mul(p, logprobs).sum(1)
    if k >= vocab_size:
        return h, h
    r = (1 - p.sum(1)).clamp_min(0)
    upper = h + zero_safe_mul(r, ((vocab_size - k) / r).log())
    lower = h - zero_safe_mul(r, logprobs.amin(1))
    # rounding can leave r > 0 beside p_(k) = 0, which makes `lower` infinite; the upper bound still holds
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
    """Reduce sharded logits to the teacher's top-k, entropy and log p(y), replicated on every rank. One collective.

    logits          [tokens, vocab/tp]; unchanged
    tokens          [tokens] ids of the sampled tokens
    teacher_tokens  [tokens] ids whose log p(y) is returned, where they differ from `tokens`
    k               ids per token; capped at vocab_size

    Raises ValueError, naming argument and row, for shapes that disagree, ids outside the vocabulary and NaN logits.
    """
    if k < 1:
        raise ValueError(f"k: {k} is not at least 1")
    shard = VocabShard.from_logits("logits", logits, vocab_size, group, chunk)
    n, k = logits.shape[0], min(k, vocab_size)
    checks = InputChecks()
    checks.tokens((n,), vocab_size, "logits have rows", tokens=tokens, teacher_tokens=teacher_tokens)
    checks.raise_first()
    token_ids = (tokens if teacher_tokens is None else teacher_tokens).long()[:, None]
    logits = logits.detach()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    ids, values = shard_top_k(logits, shard, k)
    parts = shard.all_gather(
        {
            "sums": partial_sums(logits, None, shard, dtype=dtype)[0]["student"],
            "token": gather_local_logits(logits, shard, token_ids, dtype),
            "ids": ids.T.to(dtype),
            "values": values.T.to(dtype),
        }
    )
    softmax = merge_softmax(parts["sums"])[0]
    checks.refuse_non_finite("logits", softmax.has_nan_or_inf)
    checks.raise_first()
    ids, values = (parts[name].permute(2, 0, 1).flatten(1) for name in ("ids", "values"))
    top = top_k_positions(values, ids, k)
    return TeacherTopK(
        ids=ids.gather(1, top).long(),
        logprobs=softmax.logprob(values.gather(1, top).T).T.contiguous(),
        token_logprob=softmax.logprob(parts["token"].sum(0))[0],
        entropy=softmax.entropy,
    )
