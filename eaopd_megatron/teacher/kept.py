"""A teacher's top-k as it is kept with the samples between scoring and update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from eaopd_megatron.data.samples import MicroBatch, Sample
from eaopd_megatron.objective import TeacherTopK
from eaopd_megatron.teacher.rows import TopKRows


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
            found[field.name] = batch.gather(
                [none.to(batch.tokens.device), *(s.teacher_signal[field.name] for s in batch.samples)]
            )
    return TeacherTopK(**found)
