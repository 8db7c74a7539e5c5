"""The teacher on the student's own ranks and in its layout: frozen weights, forward only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eaopd_megatron.data.packing import micro_batches
from eaopd_megatron.data.samples import MicroBatch, Sample
from eaopd_megatron.megatron.forward import head_of, hidden_rows, logits_by_rows, logits_of
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.objective import TeacherHidden, TeacherLogits, TeacherTopK, summarise_teacher
from eaopd_megatron.teacher.terminal import TerminalMap


class ColocatedTeacher:
    """Scores the student's tokens.

    signal "topk": each sample is scored once an iteration and keeps k ids and log-probs, H_t and log p(y_t): 136 bytes
    a token at k = 16. "hidden": the final hidden states, from which the objective makes the full distribution piece by
    piece. "logits": the full distribution at once, for comparison. The last two are made anew for every micro-batch.
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
        multiple: int,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.parallel, self.vocab_size, self.kind, self.top_k = parallel, vocab_size, signal, top_k
        self.terminal, self.budget, self.multiple = terminal, budget, multiple

    @torch.no_grad()
    def annotate(self, samples: Sequence[Sample]) -> None:
        """Ask once for what can be kept; every response token gets a signal or this raises."""
        if self.kind != "topk":
            return
        for batch in micro_batches(samples, self.budget, self.parallel.device, self.multiple):
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
                for part, logits in logits_by_rows(self.model, batch.token_ids, batch.rows)
            ]
            whole = {name: batch.split(torch.cat([getattr(part, name) for part in found])) for name in _TOPK_FIELDS}
            for i, sample in enumerate(batch.samples):
                sample.teacher_signal = {name: tensors[i] for name, tensors in whole.items()}

    def signal(self, batch: MicroBatch) -> TeacherTopK | TeacherHidden | TeacherLogits:
        """The teacher's signal of every response token of the micro-batch, in order."""
        with torch.no_grad():
            if self.kind == "hidden":
                return TeacherHidden(hidden_rows(self.model, batch.token_ids, batch.rows), head_of(self.model))
            if self.kind == "logits":
                return TeacherLogits(logits_of(self.model, batch.token_ids).flatten(0, 1)[batch.rows])
        for sample in batch.samples:
            scored = len(sample.teacher_signal.get("entropy", ()))
            if scored != len(sample.response_ids):
                # a gate made from missing entropies would be off in silence
                raise RuntimeError(
                    f"prompt {sample.prompt.id}: {scored} of {len(sample.response_ids)} tokens were scored"
                )
        return TeacherTopK(*(batch.gather([s.teacher_signal[name] for s in batch.samples]) for name in _TOPK_FIELDS))

    def labels(self, batch: MicroBatch) -> torch.Tensor | None:
        """[n] ids for log p(y) where the signal is the full distribution; top-k has looked them up already."""
        return None if self.kind == "topk" else self.terminal.labels(batch)


_TOPK_FIELDS = ("ids", "logprobs", "token_logprob", "entropy")
