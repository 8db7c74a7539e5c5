"""The teacher on the student's own ranks and in its layout: frozen weights, forward only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch

from eaopd_megatron.data.samples import MicroBatch, Sample
from eaopd_megatron.megatron.forward import head_of, logits_by_parts, whole
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.pipeline import forward, micro_batches
from eaopd_megatron.objective import TeacherHidden, TeacherLogits, TeacherTopK, summarise_teacher
from eaopd_megatron.teacher.interface import TeacherSignal, require_whole
from eaopd_megatron.teacher.kept import keep, kept
from eaopd_megatron.teacher.rows import TopKRows
from eaopd_megatron.teacher.terminal import TerminalMap


class ColocatedTeacher:
    """Scores the student's tokens. What it says is on the last pipeline stage, where the objective is.

    signal "topk": each sample is scored once an iteration and keeps k ids and log-probs, H_t and log p(y_t): 136 bytes
    a token at k = 16. "hidden": the final hidden states, from which the objective makes the full distribution piece by
    piece. "logits": the full distribution at once, for comparison. For the last two the hidden states of an update's
    tokens are kept while it lasts.
    """

    def __init__(
        self,
        model: ModelChunks,
        parallel: Parallel,
        *,
        vocab_size: int,
        signal: str,
        top_k: int,
        terminal: TerminalMap,
        budget: int,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.parallel, self.vocab_size, self.kind, self.top_k = parallel, vocab_size, signal, top_k
        self.terminal, self.budget = terminal, budget

    def open(self, longest: int) -> None:
        """Nothing: the model is there."""

    def ask(self, samples: Sequence[Sample]) -> None:
        """Score now what can be kept."""
        if self.kind != "topk":
            return
        batches = micro_batches(samples, self.budget, self.parallel)

        def last(index: int, rows: torch.Tensor) -> None:
            batch = batches[index]
            labels = self.terminal.labels(batch)
            found = [
                summarise_teacher(
                    logits,
                    batch.tokens[part],
                    k=self.top_k,
                    vocab_size=self.vocab_size,
                    group=self.parallel.tp_group,
                    teacher_tokens=None if labels is None else labels[part],
                )
                for part, logits in logits_by_parts(rows, head_of(self.model))
            ]
            said = {
                field.name: whole(batch, torch.cat([getattr(part, field.name) for part in found]), self.parallel)
                for field in fields(TeacherTopK)
            }
            keep(batch.samples, TeacherTopK(**said))

        forward(self.model, batches, last)

    def wait(self, samples: Sequence[Sample]) -> None:
        """Raises RuntimeError where a token was left out."""
        if self.kind == "topk" and self.parallel.is_last_stage:
            require_whole(samples)

    def close(self) -> None:
        """Nothing was started."""

    def signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """What gives, on the last stage, the signal of every response token of micro-batch number i, in order.

        The model runs now, except for "topk": collective over all ranks.
        """
        if self.kind == "topk":
            return lambda index: kept(batches[index], TopKRows(self.top_k))
        hidden: dict[int, torch.Tensor] = {}
        forward(self.model, batches, hidden.__setitem__)
        if self.kind == "hidden":
            return lambda index: TeacherHidden(hidden[index], head_of(self.model))
        return lambda index: TeacherLogits(hidden[index] @ head_of(self.model).T)

    def labels(self, batch: MicroBatch) -> torch.Tensor | None:
        """[n] ids for log p(y) where the signal is the full distribution; top-k has looked them up already."""
        return None if self.kind == "topk" else self.terminal.labels(batch)
