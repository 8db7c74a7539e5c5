"""The teacher's output for response tokens as bytes: the form in which it travels and is kept in host memory.

The sizes are computed without torch, so that planning can use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from eaopd_megatron.data.types import MicroBatch, Sample
    from eaopd_megatron.objective import TeacherTopK

_NUMBER_BYTES = 4  # an id, a log-prob or an entropy


def hidden_state_bytes(width: int, element_bytes: int) -> int:
    """Return the bytes of a hidden state of `width` numbers: 8,192 at 4,096 in bf16."""
    return width * element_bytes


def top_k_bytes(k: int, *, entropy: bool = True) -> int:
    """Return the bytes of k ids, k log-probs, log p(y) and, if known, H_t: 136 at k = 16."""
    return _NUMBER_BYTES * (2 * k + 1 + entropy)


@dataclass(frozen=True)
class HiddenStatePayload:
    """The hidden state after the final norm, h numbers: 2 h bytes a token in bf16, 4 h in fp32."""

    width: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return hidden_state_bytes(self.width, self.dtype.itemsize)

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, bytes_per_token] uint8."""
        import torch

        return hidden.to(self.dtype).contiguous().view(torch.uint8).view(len(hidden), self.bytes_per_token)

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, bytes_per_token] uint8 → [n, width]."""
        return rows.contiguous().view(self.dtype).view(len(rows), self.width)


@dataclass(frozen=True)
class TopKPayload:
    """k ids and log-probs, log p(y) and, if known, H_t: 8 k + 8 bytes a token, 136 at k = 16.

    has_entropy: whether H_t is known. If not, it takes no bytes, and the gate uses bounds of it.
    """

    k: int
    has_entropy: bool = True

    @property
    def bytes_per_token(self) -> int:
        return top_k_bytes(self.k, entropy=self.has_entropy)

    def encode(self, top_k: TeacherTopK) -> torch.Tensor:
        """n tokens → [n, bytes_per_token] uint8."""
        import torch

        numbers = [top_k.logprobs, top_k.token_logprob[:, None]]
        if self.has_entropy:
            assert top_k.entropy is not None
            numbers.append(top_k.entropy[:, None])
        columns = [top_k.ids.int().view(torch.float32), *(part.float() for part in numbers)]
        return torch.cat(columns, 1).contiguous().view(torch.uint8).view(len(top_k.ids), self.bytes_per_token)

    def decode(self, rows: torch.Tensor) -> TeacherTopK:
        """[n, bytes_per_token] uint8 → n tokens."""
        import torch

        from eaopd_megatron.objective import TeacherTopK

        columns = rows.contiguous().view(torch.float32).view(len(rows), self.bytes_per_token // _NUMBER_BYTES)
        ids = columns[:, : self.k].contiguous().view(torch.int32).long()
        return TeacherTopK(
            ids,
            columns[:, self.k : 2 * self.k].contiguous(),
            columns[:, 2 * self.k].contiguous(),
            columns[:, 2 * self.k + 1].contiguous() if self.has_entropy else None,
        )


PayloadFormat = HiddenStatePayload | TopKPayload


def split_top_k(samples: Sequence[Sample], top_k: TeacherTopK) -> list[TeacherTopK]:
    """Split the top-k of all response tokens of the samples, in order, into one per sample."""
    lengths = [len(sample.response_ids) for sample in samples]
    parts = {name: values.split(lengths) for name, values in vars(top_k).items() if values is not None}
    return [
        replace(top_k, **{name: values[number] for name, values in parts.items()}) for number in range(len(lengths))
    ]


def gather_top_k(batch: MicroBatch, payload_format: TopKPayload) -> TeacherTopK:
    """Return the top-k of this rank's response tokens of the micro-batch, from its samples."""
    import torch

    empty = payload_format.decode(torch.empty(0, payload_format.bytes_per_token, dtype=torch.uint8))
    parts = [sample.teacher_top_k for sample in batch.samples]
    joined = {
        name: batch.gather_local([none.to(batch.target_ids.device), *(getattr(part, name) for part in parts)])
        for name, none in vars(empty).items()
        if none is not None
    }
    return replace(empty, **joined)
