"""What a run asks of a teacher, wherever the teacher is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.objective import TeacherHidden, TeacherLogits, TeacherTopK

TeacherSignal = TeacherTopK | TeacherHidden | TeacherLogits


class TeacherModel(Protocol):
    """All ranks make the same calls, each with its data-parallel rank's samples. What the teacher says is on the last
    pipeline stage, where the objective is."""

    def start(self, max_tokens: int) -> None:
        """Comes first: other processes that it needs begin to start. longest: tokens of a prompt and its response
        together, at the most."""

    def open(self) -> None:
        """It is there, and is the recipe's. Raises StopRequested or ServiceUnavailable on all ranks."""

    def submit(self, samples: Sequence[Sample]) -> None:
        """The teacher may begin to score them; who waits for other processes does it in `wait`."""

    def wait(self, samples: Sequence[Sample]) -> None:
        """Return once every response token of these submitted samples is scored, or will be by `signals`.

        Collective over all ranks. Raises StopRequested or ServiceUnavailable on all of them, and RuntimeError if a
        token has no score: a gate computed from missing entropies would be off silently.
        """

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """What gives, on the last stage, the signal of every response token of micro-batch number i, in order.

        Called on all ranks; what it gives is called on all ranks of the last stage, in the order of the micro-batches.
        """

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        """[n] ids under which log p(y) is looked up; None: the tokens' own, or they have been looked up already."""

    def close(self) -> None:
        """Ends what was started for it. A second call does nothing."""


def require_scored(samples: Sequence[Sample]) -> None:
    """Raises RuntimeError where the teacher's top-k lacks a response token."""
    for sample in samples:
        require_row_count(sample, len(sample.teacher_signal.get("logprobs", ())))


def require_row_count(sample: Sample, num_rows: int) -> None:
    """Raises RuntimeError where so many rows are not one for each of its response tokens."""
    if num_rows != len(sample.response_ids):
        raise RuntimeError(
            f"prompt {sample.prompt.id}: the teacher scored {num_rows} of {len(sample.response_ids)} tokens"
        )
