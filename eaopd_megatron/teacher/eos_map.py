"""The EOS map: how student and teacher agree on the token that ends a response.

A base student ends with one id, its chat teacher expects another. Without a map the teacher gives the student's stop
about −21 nats, OPD punishes stopping, and truncation goes to 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eaopd_megatron.data.types import MicroBatch, Sample


@dataclass(frozen=True)
class TerminalMap:
    """kind: "swap" exchanges the two ids in the teacher's output rows, so that every term of the objective means the
    same stop; "label" (the paper) only looks up the terminal token's teacher log-prob under the teacher's id; "none"
    changes nothing."""

    kind: str
    student_id: int
    teacher_id: int

    @classmethod
    def between(cls, kind: str, student_eos: list[int], teacher_eos: list[int]) -> TerminalMap:
        """Return the map between the first end-of-sequence ids of the two models: "none" if they are the same."""
        same = not student_eos or not teacher_eos or student_eos[0] == teacher_eos[0]
        if same or kind == "none":
            return cls("none", *(student_eos or [-1])[:1], *(teacher_eos or [-1])[:1])
        return cls(kind, student_eos[0], teacher_eos[0])

    def row_map(self) -> dict[int, int] | None:
        """Return the output rows to exchange when the teacher's weights are loaded."""
        if self.kind != "swap":
            return None
        return {self.student_id: self.teacher_id, self.teacher_id: self.student_id}

    def batch_target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        """Return the ids [n] whose log p(y) is looked up; None: the response tokens themselves."""
        if self.kind != "label":
            return None
        terminal = batch.is_terminal() & (batch.target_ids == self.student_id)
        return torch.where(terminal, self.teacher_id, batch.target_ids)

    def terminal_target_id(self, sample: Sample) -> int | None:
        """Return the id whose log p is looked up for the last token of the response; None: that token itself."""
        ended = sample.finish_reason == "stop" and sample.response_ids[-1:] == [self.student_id]
        return self.teacher_id if self.kind == "label" and ended else None

    def swap_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Translate ids of the teacher into the student's, or the other way round: the same shape."""
        if self.kind != "swap":
            return ids
        own, other = self.student_id, self.teacher_id
        return torch.where(ids == own, other, torch.where(ids == other, own, ids))

    def teacher_ids(self, sample: Sample) -> torch.Tensor:
        """Return the teacher's ids [response tokens] that hold log p(y) of the response."""
        ids = self.swap_ids(torch.tensor(sample.response_ids, dtype=torch.long))
        if (target := self.terminal_target_id(sample)) is not None:
            ids[-1] = target
        return ids

    def remapped_ids(self, sample: Sample) -> list[int]:
        """Return those of `teacher_ids` that differ from the response's token, sorted, without duplicates."""
        pairs = zip(self.teacher_ids(sample).tolist(), sample.response_ids, strict=True)
        return sorted({mapped for mapped, token in pairs if mapped != token})
