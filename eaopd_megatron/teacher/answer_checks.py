"""Invariants of a teacher's answer that need nothing but the answer and the tokens it is about.

A teacher that serves other ids, shifted rows or an entropy of something else gives finite numbers of plausible size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eaopd_megatron.data.types import Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.objective import TeacherTopK
from eaopd_megatron.objective.teacher import entropy_bounds
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import PayloadFormat, TopKPayload
from eaopd_megatron.utils.files import atomic_write

_LOGPROB_TOLERANCE = 1e-3
"""Nats, and probability: an honest teacher computes all values of a row from the same logits, in fp32 or better."""
_ENTROPY_TOLERANCE = 5e-3
"""Nats by which an entropy, a sum over the vocabulary in fp32, may miss bounds computed from k of its terms."""


@dataclass(frozen=True)
class AnswerFormat:
    """vocab_size: ids that an answer may hold. distribution_size: ids of the distribution whose k largest log-probs it
    holds; None: larger ones may have been removed."""

    vocab_size: int
    distribution_size: int | None


def looked_up_ids(sample: Sample, terminal: TerminalMap) -> torch.Tensor:
    """Return the ids [response tokens], among those of a top-k answer, whose log p(y) the answer holds."""
    ids = torch.tensor(sample.response_ids, dtype=torch.long)
    if (target := terminal.terminal_target_id(sample)) is not None:
        ids[-1] = target
    return ids


def find_contradiction(top_k: TeacherTopK, tokens: torch.Tensor, answer: AnswerFormat) -> tuple[int, str] | None:
    """Return the first row of a top-k answer that no distribution has, and what is wrong with it; None: all is well.

    tokens [n]: the ids of `token_logprob`.
    """
    ids, logprobs, own = top_k.ids, top_k.logprobs.double(), top_k.token_logprob.double()
    k, size = ids.shape[1], answer.distribution_size
    ordered = ids.sort(1).values
    here, least, rest = ids == tokens[:, None], logprobs[:, -1], 1 - logprobs.exp().sum(1)
    in_k, entry = here.any(1), torch.where(here, logprobs, 0).sum(1)
    outside = ((ids < 0) | (ids >= answer.vocab_size)).any(1)
    found: list[tuple[torch.Tensor, str]] = [
        (outside, f"an id is outside the vocabulary of {answer.vocab_size}"),
        ((ordered[:, 1:] == ordered[:, :-1]).any(1), "an id stands twice"),
        (~(logprobs.isfinite().all(1) & own.isfinite()), "a log-prob is not finite"),
        ((logprobs[:, 1:] > logprobs[:, :-1] + _LOGPROB_TOLERANCE).any(1), "its log-probs do not descend"),
        (rest < -_LOGPROB_TOLERANCE, f"the probabilities of its {k} top ids add up to more than 1"),
        (in_k & ((own - entry).abs() > _LOGPROB_TOLERANCE), "log p(y) is not that of y among its top ids"),
        (~in_k & (own > least + _LOGPROB_TOLERANCE), "y is not among its top ids, but log p(y) is larger than theirs"),
        (~in_k & (own.exp() > rest + _LOGPROB_TOLERANCE), "p(y) is larger than what its top ids leave"),
    ]
    if size is not None:
        too_little = rest > (size - k) * least.exp() + _LOGPROB_TOLERANCE
        found.append((too_little, "its top ids leave more probability than the others can have"))
    if top_k.entropy is not None:
        entropy = top_k.entropy.double()
        found.append((~(entropy >= -_ENTROPY_TOLERANCE), "its entropy is not a number of at least 0"))
        if size is not None:
            lower, upper = entropy_bounds(logprobs, size)
            found.append((entropy > math.log(size) + _ENTROPY_TOLERANCE, f"its entropy is above ln {size}"))
            impossible = (entropy < lower - _ENTROPY_TOLERANCE) | (entropy > upper + _ENTROPY_TOLERANCE)
            found.append((impossible, "its entropy is impossible with its top log-probs"))
    bad = torch.stack([rows for rows, _ in found])
    if not bad.any():
        return None
    row = int(bad.any(0).nonzero()[0])
    return row, found[int(bad[:, row].nonzero()[0])][1]


@dataclass(frozen=True)
class AnswerChecks:
    """What a teacher's answers are held against. failures: folder for the samples of those that are refused."""

    payload_format: PayloadFormat
    answer: AnswerFormat
    terminal: TerminalMap
    failures: Path | None = None

    def require_credible(self, rows: torch.Tensor, samples: Sequence[Sample], source: str) -> None:
        """Raise UserError if an answer [response tokens of the samples, bytes_per_token] cannot be a model's.

        Of hidden states no more can be said than that they are finite. source: the server's URL.
        """
        if isinstance(self.payload_format, TopKPayload):
            tokens = torch.cat([looked_up_ids(sample, self.terminal) for sample in samples])
            found = find_contradiction(self.payload_format.decode(rows), tokens, self.answer)
        else:
            bad = ~self.payload_format.decode(rows).isfinite().all(1)
            found = (int(bad.nonzero()[0]), "a hidden state is not finite") if bad.any() else None
        if found is None:
            return
        row, why = found
        for sample in samples:
            if row < len(sample.response_ids):
                break
            row -= len(sample.response_ids)
        raise UserError(
            f"{source}: its answer about prompt {sample.prompt.id}, response token {row} (id "
            f"{sample.response_ids[row]}), cannot be a model's: {why}; check which weights, tokenizer and program "
            f"serve there{self._save(sample, row, why)}"
        )

    def _save(self, sample: Sample, row: int, why: str) -> str:
        if self.failures is None:
            return ""
        path = self.failures / f"teacher_answer_{sample.index:06d}.json"
        atomic_write(path, json.dumps(sample.record("") | {"token": row, "why": why}))
        return f"; the sample is saved in {path}"
