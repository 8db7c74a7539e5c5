"""The interface of a teacher, wherever it is, and the router over the teachers of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from eaopd_megatron.data.packing import group_by_teacher
from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.objective import TeacherHidden, TeacherLogits, TeacherTopK

TeacherSignal = TeacherTopK | TeacherHidden | TeacherLogits


class TeacherModel(Protocol):
    """All ranks make the same calls, each with the samples of its data-parallel rank. The signal is on the last
    pipeline stage, where the objective is computed.

    A teacher without processes of its own inherits `start`, `open` and `close`, which do nothing.
    """

    def start(self, max_tokens: int) -> None:
        """Start other processes that the teacher needs, without waiting. Call it first.

        max_tokens: upper bound of the tokens of a prompt and its response together.
        """
        return

    def open(self) -> None:
        """Connect, and verify that the service serves the model that the recipe names. Raises StopRequested or
        ServiceUnavailable on all ranks."""
        return

    def submit(self, samples: Sequence[Sample]) -> None:
        """Start to score these samples. Non-blocking; remote teachers block in `wait`."""

    def wait(self, samples: Sequence[Sample]) -> list[Sample]:
        """Wait until the submitted samples are scored, and return them, in the same order.

        A top-k signal is in their `teacher_top_k` on the last pipeline stage; hidden states and logits come from
        `micro_batch_signals`. Collective over all ranks. Raises StopRequested or ServiceUnavailable on all of them, and
        RuntimeError if a token has no score: a gate computed from missing entropies would be off silently.
        """

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """Return a function from the number of a micro-batch to the signal of its response tokens, in order.

        Call it on all ranks, and the function on all ranks of the last stage, in the order of the micro-batches.
        """

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        """Return the ids [n] whose log p(y) the objective looks up in the signal; None: the tokens' own ids, or the
        signal holds the looked-up values."""

    def close(self) -> None:
        """Stop everything that `start` started. Idempotent."""
        return


class TeacherRouter:
    """The teachers of a recipe as one: each scores the samples whose `Prompt.teacher` is its name ('' for the only
    one). Methods are those of `TeacherModel`. All ranks make the same calls, which reach the teachers in
    the same order."""

    def __init__(self, teachers: Mapping[str, TeacherModel]) -> None:
        self.teachers = dict(teachers)

    @property
    def names(self) -> list[str]:
        return list(self.teachers)

    def open(self, max_tokens: int) -> None:
        """Start all teachers, then open them: as `TeacherModel.start` and `TeacherModel.open`."""
        for teacher in self.teachers.values():
            teacher.start(max_tokens)
        for teacher in self.teachers.values():
            teacher.open()

    def submit(self, samples: Sequence[Sample]) -> None:
        for name, group in group_by_teacher(samples, self.names):
            self.teachers[name].submit(group)

    def wait(self, samples: Sequence[Sample]) -> list[Sample]:
        groups = group_by_teacher(samples, self.names)
        scored = {name: iter(self.teachers[name].wait(group)) for name, group in groups}
        return [next(scored[sample.prompt.teacher]) for sample in samples]

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """As `TeacherModel.micro_batch_signals`, for micro-batches of one teacher each (`MicroBatch.teacher`)."""
        numbers = {name: [i for i, batch in enumerate(batches) if batch.teacher == name] for name in self.names}
        signals = {
            name: self.teachers[name].micro_batch_signals([batches[i] for i in own]) for name, own in numbers.items()
        }
        return lambda index: signals[batches[index].teacher](numbers[batches[index].teacher].index(index))

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        return self.teachers[batch.teacher].target_ids(batch)

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()


def require_scored(samples: Sequence[Sample]) -> None:
    """Raise RuntimeError if the teacher's top-k lacks a response token."""
    for sample in samples:
        require_row_count(sample, 0 if sample.teacher_top_k is None else len(sample.teacher_top_k.logprobs))


def require_row_count(sample: Sample, num_rows: int) -> None:
    """Raise RuntimeError unless there is one row for each response token of the sample."""
    if num_rows != len(sample.response_ids):
        raise RuntimeError(
            f"prompt {sample.prompt.id}: the teacher scored {num_rows} of {len(sample.response_ids)} tokens"
        )
