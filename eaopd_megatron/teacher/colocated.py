"""The teacher on the student's own ranks and in its layout: frozen weights, forward only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
import torch.distributed as dist

from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import gather_context_parallel, logits_in_chunks, output_weight
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.offload import FrozenWeights
from eaopd_megatron.megatron.pipeline import micro_batches, run_forward
from eaopd_megatron.objective import TeacherHidden, TeacherLogits, TeacherTopK, summarise_teacher
from eaopd_megatron.teacher.base import TeacherModel, TeacherSignal, require_scored
from eaopd_megatron.teacher.eos_map import MASKED_LOGIT, TerminalMap, mask_head, mask_hidden, masked_columns
from eaopd_megatron.teacher.payload import TopKPayload, gather_top_k, split_top_k


def top_k_of_hidden(
    hidden: torch.Tensor,
    head: torch.Tensor,
    response_ids: torch.Tensor,
    target_ids: torch.Tensor | None,
    *,
    top_k: int,
    vocab_size: int,
    group: dist.ProcessGroup,
    masked_ids: Sequence[int] = (),
) -> TeacherTopK:
    """Return the top-k of n tokens from their hidden states [n, h] and the output weight [V_padded/tp, h].

    The logits are computed in chunks. response_ids [n]; target_ids [n]: ids whose log p(y) is looked up, if they differ
    from the response's. masked_ids: ids with probability 0. Collective over the tensor-parallel group.
    """
    columns = masked_columns(masked_ids, len(head), dist.get_rank(group))
    masked = torch.tensor(columns, dtype=torch.long, device=head.device)
    chunks = [
        summarise_teacher(
            logits.index_fill_(1, masked, MASKED_LOGIT) if columns else logits,
            response_ids[part],
            k=top_k,
            vocab_size=vocab_size,
            group=group,
            teacher_tokens=None if target_ids is None else target_ids[part],
        )
        for part, logits in logits_in_chunks(hidden, head)
    ]
    return TeacherTopK(
        **{field.name: torch.cat([getattr(chunk, field.name) for chunk in chunks]) for field in fields(TeacherTopK)}
    )


class ColocatedTeacher(TeacherModel):
    """The teacher's model on the student's ranks.

    signal "topk": each sample is scored once an iteration, and k ids and log-probs, H_t and log p(y_t) are stored: 136
    bytes a token at k = 16. "hidden": the final hidden states, from which the objective computes the full distribution
    in chunks. "logits": the full distribution at once, for comparison. For the last two the hidden states of an
    update's tokens are stored during the update.

    offload: the weights are on the device only while the teacher scores, and for the last two signals its output layer
    during an update. It then scores in `wait`, not in `submit`, because the rollout has left the device by then.
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
        micro_batch_tokens: int,
        offload: bool = False,
    ) -> None:
        """vocab_size: ids that student and teachers have."""
        self.model = model.eval().requires_grad_(False)
        self.parallel, self.vocab_size, self.signal, self.top_k = parallel, vocab_size, signal, top_k
        self.terminal, self.micro_batch_tokens = terminal, micro_batch_tokens
        self._weights = FrozenWeights(model) if offload else None
        self._scores: dict[int, TeacherTopK] = {}  # by Sample.index, between `submit` and `wait`

    def submit(self, samples: Sequence[Sample]) -> None:
        """Compute the top-k now, unless the weights are offloaded."""
        if self.signal == "topk" and self._weights is None:
            self._score(samples)

    def wait(self, samples: Sequence[Sample]) -> list[Sample]:
        if self.signal != "topk":
            return list(samples)
        if self._weights is not None:
            with self._weights.onload():
                self._score(samples)
        scored = [replace(sample, teacher_top_k=self._scores.pop(sample.index, None)) for sample in samples]
        if self.parallel.is_last_stage:
            require_scored(scored)
        return scored

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """As `TeacherModel.micro_batch_signals`. Except for "topk" it runs the model now: collective over all ranks."""
        if self.signal == "topk":
            return lambda index: gather_top_k(batches[index], TopKPayload(self.top_k))
        hidden: dict[int, torch.Tensor] = {}
        with nullcontext() if self._weights is None else self._weights.onload():
            run_forward(self.model, batches, hidden.__setitem__)
        masked = self.terminal.masked_ids
        head = mask_head(self._head(), masked, self.parallel.tp_rank) if self.parallel.is_last_stage else self._head()
        if self.signal == "hidden":
            return lambda index: TeacherHidden(mask_hidden(hidden[index], masked), head)
        return lambda index: TeacherLogits(mask_hidden(hidden[index], masked) @ head.T)

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        return None if self.signal == "topk" else self.terminal.batch_target_ids(batch)

    def _score(self, samples: Sequence[Sample]) -> None:
        batches = micro_batches(samples, self.micro_batch_tokens, self.parallel)

        def on_last_stage(index: int, hidden: torch.Tensor) -> None:
            batch = batches[index]
            local = top_k_of_hidden(
                hidden,
                output_weight(self.model),
                batch.target_ids,
                self.terminal.batch_target_ids(batch),
                top_k=self.top_k,
                vocab_size=self.vocab_size,
                group=self.parallel.tp_group,
                masked_ids=self.terminal.masked_ids,
            )
            gathered = {name: gather_context_parallel(batch, own, self.parallel) for name, own in vars(local).items()}
            top_k = TeacherTopK(**gathered)
            for sample, part in zip(batch.samples, split_top_k(batch.samples, top_k), strict=True):
                if sample.index in self._scores:
                    raise RuntimeError(f"prompt {sample.prompt.id}: it was scored twice")
                self._scores[sample.index] = part

        run_forward(self.model, batches, on_last_stage)

    def _head(self) -> torch.Tensor:
        """Return the output layer's rows on the last stage, an empty tensor on the others."""
        if not self.parallel.is_last_stage:
            return torch.empty(0)
        head = output_weight(self.model)
        return head if self._weights is None else self._weights.weight_on_device(head)
