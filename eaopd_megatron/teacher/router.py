"""The teachers of a recipe as one: each is asked about the prompts that are for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.pipeline import micro_batches
from eaopd_megatron.teacher.base import TeacherModel, TeacherSignal


class TeacherRouter:
    """Keyed by `Prompt.teacher`; a recipe's only teacher is ''. All ranks make the same calls."""

    def __init__(self, named: Mapping[str, TeacherModel]) -> None:
        self.teachers = dict(named)

    def open(self, max_tokens: int) -> None:
        """As `Teacher.start` and `Teacher.open`: they start together."""
        for teacher in self.teachers.values():
            teacher.start(max_tokens)
        for teacher in self.teachers.values():
            teacher.open()

    def submit(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.ask`."""
        for name, teacher in self.teachers.items():
            teacher.submit(_for_teacher(name, samples))

    def wait(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.wait`."""
        for name, teacher in self.teachers.items():
            teacher.wait(_for_teacher(name, samples))

    def micro_batches(self, samples: Sequence[Sample], budget: int, parallel: ParallelState) -> list[MicroBatch]:
        """As `pipeline.micro_batches`, each with the samples of one teacher: it has one output head."""
        return [
            replace(batch, teacher=name)
            for name in self.teachers
            for batch in micro_batches(_for_teacher(name, samples), budget, parallel)
        ]

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """As `Teacher.signals`."""
        places = {
            name: [i for i, batch in enumerate(batches) if batch.teacher == name]
            for name in self.teachers  # in the same order on every rank
        }
        of = {
            name: self.teachers[name].micro_batch_signals([batches[i] for i in mine]) for name, mine in places.items()
        }
        return lambda index: of[batches[index].teacher](places[batches[index].teacher].index(index))

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        """As `Teacher.labels`."""
        return self.teachers[batch.teacher].target_ids(batch)

    def close(self) -> None:
        """As `Teacher.close`."""
        for teacher in self.teachers.values():
            teacher.close()


def _for_teacher(name: str, samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.prompt.teacher == name]
