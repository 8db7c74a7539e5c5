"""What is known of one response token, as a row of bytes: how it travels and how it is kept in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.objective import TeacherTopK
from eaopd_megatron.teacher.payload_sizes import hidden_bytes, topk_bytes


@dataclass(frozen=True)
class HiddenRows:
    """The hidden state after the final norm: 2 h bytes in bf16, 4 h in fp32."""

    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of a token."""
        return hidden_bytes(self.width, self.dtype.itemsize)

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, bytes] uint8."""
        return hidden.to(self.dtype).contiguous().view(torch.uint8).view(len(hidden), self.bytes)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, bytes] uint8 → [n, width]."""
        return rows.contiguous().view(self.dtype).view(len(rows), self.width)


@dataclass(frozen=True)
class TopKRows:
    """k ids and log-probs, log p(y), and H_t where it is known: 8 k + 8 bytes, 136 at k = 16.

    entropy: whether H_t is known; if not, it has no bytes, and the gate is made from the bounds.
    """

    k: int
    entropy: bool = True

    @property
    def bytes(self) -> int:
        """Of a token."""
        return topk_bytes(self.k, entropy=self.entropy)

    def encode(self, said: TeacherTopK) -> torch.Tensor:
        """→ [n, bytes] uint8."""
        numbers = [said.logprobs, said.token_logprob[:, None]]
        if self.entropy:
            assert said.entropy is not None
            numbers.append(said.entropy[:, None])
        columns = [said.ids.int().view(torch.float32), *(part.float() for part in numbers)]
        return torch.cat(columns, 1).contiguous().view(torch.uint8).view(len(said.ids), self.bytes)

    def decode(self, rows: torch.Tensor) -> TeacherTopK:
        """[n, bytes] uint8 →"""
        columns = rows.contiguous().view(torch.float32).view(len(rows), self.bytes // 4)
        ids = columns[:, : self.k].contiguous().view(torch.int32).long()
        return TeacherTopK(
            ids,
            columns[:, self.k : 2 * self.k].contiguous(),
            columns[:, 2 * self.k].contiguous(),
            columns[:, 2 * self.k + 1].contiguous() if self.entropy else None,
        )


Rows = HiddenRows | TopKRows


def keep(samples: Sequence[Sample], said: TeacherTopK) -> None:
    """said: of all their response tokens, sample after sample."""
    lengths = [len(sample.response_ids) for sample in samples]
    for field in fields(said):
        values = getattr(said, field.name)
        if values is not None:
            for sample, part in zip(samples, values.split(lengths), strict=True):
                sample.teacher_signal[field.name] = part


def kept(batch: MicroBatch, rows: TopKRows) -> TeacherTopK:
    """Of the micro-batch's response tokens on this rank."""
    nothing = rows.decode(torch.empty(0, rows.bytes, dtype=torch.uint8))
    found = {}
    for field in fields(nothing):
        none = getattr(nothing, field.name)
        if none is not None:
            found[field.name] = batch.gather_local(
                [none.to(batch.target_ids.device), *(s.teacher_signal[field.name] for s in batch.samples)]
            )
    return TeacherTopK(**found)
