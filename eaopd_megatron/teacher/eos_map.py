"""The EOS map: how student and teacher agree on the token that ends a response.

A base student ends with one id, its chat teacher expects another. Without a map the teacher gives the student's stop
about −21 nats, OPD punishes stopping, and truncation goes to 100 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder, check_same_tokenizer
from eaopd_megatron.config.schema import TeacherConfig
from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.errors import UserError


@dataclass(frozen=True)
class TerminalMap:
    """kind: "swap" exchanges the two ids in the teacher's output rows, so that every term of the objective means the
    same stop; "label" (the paper) only looks up the terminal token's teacher log-prob under the teacher's id; "none"
    changes nothing."""

    kind: str
    student_id: int
    teacher_id: int
    masked_ids: tuple[int, ...] = ()  # of the student, that stand for other texts in the teacher: it gives them 0

    @classmethod
    def of_folders(cls, config: TeacherConfig, student: HfFolder, teacher: HfFolder) -> TerminalMap:
        """Return the map of two models, with the ids that teacher.tokenizer_check=shared leaves out.

        An end id that the map translates means the same in both, whatever its text. Raises UserError for other
        tokenizers, and if an end id of the student has another text in the teacher and is not translated.
        """
        found = cls.between(config.terminal_map, student.eos_ids, teacher.eos_ids)
        if config.tokenizer_check == "exact":  # nothing differs: `open_teacher_folders` has looked
            return found
        different = set(check_same_tokenizer(teacher, student, allowed=config.tokenizer_check))
        own, other = found.student_id, found.teacher_id
        translated = {own} if own == other or found.kind == "swap" else set[int]()
        if found.kind == "label":
            translated = {own, other}
        if found.kind == "swap" and own in different:
            different.add(other)  # the teacher's row there is the one that its id of the student's end had
        masked = sorted(i for i in different - translated if i < min(student.vocab_size, teacher.vocab_size))
        if ends := [i for i in student.eos_ids[:1] if i in masked]:
            raise UserError(
                f"{teacher.name}: token {ends[0]}, with which the student ends, is another one in {teacher.path}: set "
                f"{teacher.name.removesuffix('.model')}.terminal_map=swap"
            )
        return replace(found, masked_ids=tuple(masked))

    @classmethod
    def between(cls, kind: str, student_eos: list[int], teacher_eos: list[int]) -> TerminalMap:
        """Return the map between the first end-of-sequence ids of the two models: "none" if they are the same."""
        same = not student_eos or not teacher_eos or student_eos[0] == teacher_eos[0]
        if same or kind == "none":
            return cls("none", (student_eos or [-1])[0], (teacher_eos or [-1])[0])
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


MASKED_LOGIT = -1e4
"""Logit of an id that the teacher does not have: e^-1e4 is 0, and products with 0 stay finite."""
_MASK_COLUMNS = 8  # one is used; the rest keeps rows aligned


def masked_columns(masked_ids: Sequence[int], columns: int, tp_rank: int) -> list[int]:
    """Return the columns of the masked ids on a tensor-parallel rank that has `columns` of them."""
    return [i - tp_rank * columns for i in masked_ids if 0 <= i - tp_rank * columns < columns]


def mask_head(head: torch.Tensor, masked_ids: Sequence[int], tp_rank: int) -> torch.Tensor:
    """Return the head [V/tp, h + 8] whose product with `mask_hidden` gives masked ids MASKED_LOGIT."""
    if not masked_ids:
        return head
    out = torch.cat([head, head.new_zeros(len(head), _MASK_COLUMNS)], 1)
    rows = masked_columns(masked_ids, len(head), tp_rank)
    out[rows] = 0
    out[rows, head.shape[1]] = MASKED_LOGIT
    return out


def mask_hidden(hidden: torch.Tensor, masked_ids: Sequence[int]) -> torch.Tensor:
    """Return the hidden states [n, h + 8] for `mask_head`."""
    return torch.cat([hidden, hidden.new_ones(len(hidden), _MASK_COLUMNS)], 1) if masked_ids else hidden
