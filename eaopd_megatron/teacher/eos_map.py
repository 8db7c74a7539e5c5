"""How student and teacher agree on the token that ends a response (docs: the EOS mismatch punishes stopping).

A base student ends with one id, its chat teacher expects another; unmapped, the teacher gives the student's stop
about −21 nats and truncation goes to 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eaopd_megatron.data.types import MicroBatch, Sample


@dataclass(frozen=True)
class TerminalMap:
    """kind: "swap" exchanges the two ids in the teacher's output rows, so every term of the objective means the same
    stop;
    "label" (the paper) only looks up the terminal token's teacher log-prob under the teacher's id; "none" changes
    nothing."""

    kind: str
    student_id: int
    teacher_id: int

    @classmethod
    def between(cls, kind: str, student_eos: list[int], teacher_eos: list[int]) -> TerminalMap:
        """The map between the first end-of-sequence ids of the two models; "none" where they agree."""
        same = not student_eos or not teacher_eos or student_eos[0] == teacher_eos[0]
        if same or kind == "none":
            return cls("none", *(student_eos or [-1])[:1], *(teacher_eos or [-1])[:1])
        return cls(kind, student_eos[0], teacher_eos[0])

    def row_map(self) -> dict[int, int] | None:
        """Output rows to exchange when the teacher's weights are loaded."""
        if self.kind != "swap":
            return None
        return {self.student_id: self.teacher_id, self.teacher_id: self.student_id}

    def batch_target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        """[n] ids under which log p(y) is looked up, or None where they are the tokens themselves."""
        if self.kind != "label":
            return None
        terminal = batch.is_terminal() & (batch.target_ids == self.student_id)
        return torch.where(terminal, self.teacher_id, batch.target_ids)

    def terminal_target_id(self, sample: Sample) -> int | None:
        """The id under which log p of the response's last token is looked up, where it is not that token itself."""
        ended = sample.finish_reason == "stop" and sample.response_ids[-1:] == [self.student_id]
        return self.teacher_id if self.kind == "label" and ended else None

    def swap_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids of the teacher's as the student means them, and the other way round: of the same shape."""
        if self.kind != "swap":
            return ids
        own, other = self.student_id, self.teacher_id
        return torch.where(ids == own, other, torch.where(ids == other, own, ids))

    def teacher_ids(self, sample: Sample) -> torch.Tensor:
        """[response tokens] the teacher's ids under which their log p(y) stands."""
        ids = self.swap_ids(torch.tensor(sample.response_ids, dtype=torch.long))
        if (label := self.terminal_target_id(sample)) is not None:
            ids[-1] = label
        return ids

    def remapped_ids(self, sample: Sample) -> list[int]:
        """Those of `asked` that stand for another token of the response than themselves, each once."""
        pairs = zip(self.teacher_ids(sample).tolist(), sample.response_ids, strict=True)
        return sorted({asked for asked, token in pairs if asked != token})
