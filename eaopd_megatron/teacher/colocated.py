"""The teacher on the student's own ranks and in its layout: frozen weights, forward only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields

import torch

from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import gather_context_parallel, output_weight
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.offload import FrozenWeights
from eaopd_megatron.megatron.pipeline import micro_batches, run_forward
from eaopd_megatron.objective import TeacherHidden, TeacherLogits, TeacherTopK
from eaopd_megatron.teacher.base import TeacherSignal, require_scored
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import TopKPayload, load_top_k, store_top_k
from eaopd_megatron.teacher.service.scorer import top_k_of_hidden


class ColocatedTeacher:
    """Scores the student's tokens. What it says is on the last pipeline stage, where the objective is.

    signal "topk": each sample is scored once an iteration and keeps k ids and log-probs, H_t and log p(y_t): 136 bytes
    a token at k = 16. "hidden": the final hidden states, from which the objective makes the full distribution piece by
    piece. "logits": the full distribution at once, for comparison. For the last two the hidden states of an update's
    tokens are kept while it lasts.

    offload: its weights are on the device only while it scores, and for the last two signals its output layer while an
    update uses it. It scores in `wait` then, not in `ask`: who wrote the responses has left the device by then.
    """

    def __init__(
        self,
        model: ModelChunks,
        parallel: ParallelState,
        *,
        vocab_size: int,
        signal: str,
        top_k: int,
        terminal: TerminalMap,
        budget: int,
        offload: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.parallel, self.vocab_size, self.signal, self.top_k = parallel, vocab_size, signal, top_k
        self.terminal, self.budget = terminal, budget
        self._weights = FrozenWeights(model) if offload else None

    def start(self, max_tokens: int) -> None:
        """Nothing is to be started."""

    def open(self) -> None:
        """The model is there."""

    def submit(self, samples: Sequence[Sample]) -> None:
        """Score now what can be kept."""
        if self.signal == "topk" and self._weights is None:
            self._score(samples)

    def _score(self, samples: Sequence[Sample]) -> None:
        batches = micro_batches(samples, self.budget, self.parallel)

        def last(index: int, rows: torch.Tensor) -> None:
            batch = batches[index]
            found = top_k_of_hidden(
                rows,
                output_weight(self.model),
                batch.target_ids,
                self.terminal.batch_target_ids(batch),
                top_k=self.top_k,
                vocab_size=self.vocab_size,
                group=self.parallel.tp_group,
            )
            said = {
                field.name: gather_context_parallel(batch, getattr(found, field.name), self.parallel)
                for field in fields(TeacherTopK)
            }
            store_top_k(batch.samples, TeacherTopK(**said))

        run_forward(self.model, batches, last)

    def wait(self, samples: Sequence[Sample]) -> None:
        """Raises RuntimeError where a token was left out."""
        if self.signal == "topk" and self._weights is not None:
            with self._weights.onload():
                self._score(samples)
        if self.signal == "topk" and self.parallel.is_last_stage:
            require_scored(samples)

    def close(self) -> None:
        """Nothing was started."""

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """What gives, on the last stage, the signal of every response token of micro-batch number i, in order.

        The model runs now, except for "topk": collective over all ranks.
        """
        if self.signal == "topk":
            return lambda index: load_top_k(batches[index], TopKPayload(self.top_k))
        hidden: dict[int, torch.Tensor] = {}
        with nullcontext() if self._weights is None else self._weights.onload():
            run_forward(self.model, batches, hidden.__setitem__)
        head = self._head()
        if self.signal == "hidden":
            return lambda index: TeacherHidden(hidden[index], head)
        return lambda index: TeacherLogits(hidden[index] @ head.T)

    def _head(self) -> torch.Tensor:
        """On the last stage the output layer's rows; on the others nothing."""
        if not self.parallel.is_last_stage:
            return torch.empty(0)
        head = output_weight(self.model)
        return head if self._weights is None else self._weights.weight_on_device(head)

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        """[n] ids for log p(y) where the signal is the full distribution; top-k has looked them up already."""
        return None if self.signal == "topk" else self.terminal.batch_target_ids(batch)
