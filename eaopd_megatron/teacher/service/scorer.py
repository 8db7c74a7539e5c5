"""The teacher's model on the service's ranks: requests in, rows on the main rank out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.distributed as dist

from eaopd_megatron.data.packing import collate
from eaopd_megatron.data.types import MicroBatch, Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import logits_in_chunks, output_weight
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.pipeline import packing_for, run_forward
from eaopd_megatron.objective import TeacherTopK, summarise_teacher
from eaopd_megatron.teacher.payload import HiddenStatePayload, PayloadFormat
from eaopd_megatron.teacher.protocol import ScoreRequest


def top_k_of_hidden(
    rows: torch.Tensor,
    head: torch.Tensor,
    tokens: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    top_k: int,
    vocab_size: int,
    group: dist.ProcessGroup,
) -> TeacherTopK:
    """Of rows [n, h] under head [V_padded/tp, h]. Logits are made a part at a time.

    tokens [n]; labels [n]: ids under which log p(y) is looked up, where they differ from the tokens. Collective over
    the tensor-parallel group.
    """
    found = [
        summarise_teacher(
            logits,
            tokens[part],
            k=top_k,
            vocab_size=vocab_size,
            group=group,
            teacher_tokens=None if labels is None else labels[part],
        )
        for part, logits in logits_in_chunks(rows, head)
    ]
    joined = {field.name: torch.cat([getattr(part, field.name) for part in found]) for field in fields(TeacherTopK)}
    return TeacherTopK(**joined)


class TeacherScorer:
    """All ranks make the same calls.

    Every request is one micro-batch: whatever else is scored with it, its rows are the same, bit for bit. Where experts
    need data-parallel ranks, its samples are dealt over them, always in the same way.
    """

    def __init__(self, model: ModelChunks, parallel: ParallelState, rows: PayloadFormat, *, vocab_size: int) -> None:
        """vocab_size: over which top-k is normalised. Collective."""
        self.model = model.eval().requires_grad_(False)
        self.parallel, self.payload_format, self._vocab_size = parallel, rows, vocab_size
        places: list[tuple[bool, int]] = [(parallel.reports_metrics, parallel.dp_rank)]
        if parallel.world_size > 1:
            mine, places = places[0], [(False, 0)] * parallel.world_size
            dist.all_gather_object(places, mine)
        self._speakers = {dp_rank: rank for rank, (speaks, dp_rank) in enumerate(places) if speaks}

    @property
    def max_batch(self) -> int:
        """Requests that one forward pass should have: enough to keep a pipeline busy, else one, to be answered soon."""
        return 1 if self.parallel.pp_size == 1 else 4 * self.parallel.pp_size

    def score(self, requests: Sequence[ScoreRequest]) -> list[torch.Tensor]:
        """Rows [response tokens, bytes] uint8 of each request, in host memory; on the main rank alone. Collective."""
        parallel = self.parallel
        packing = packing_for(parallel.layout)
        batches = [
            collate(request_samples(r)[parallel.dp_rank :: parallel.dp_size], parallel.device, packing)
            for r in requests
        ]
        mine: dict[int, torch.Tensor] = {}

        def last(index: int, rows: torch.Tensor) -> None:
            encoded = self._encode(rows, batches[index], requests[index])
            if parallel.reports_metrics:
                mine[index] = encoded.cpu()

        run_forward(self.model, batches, last)
        return [self._collect(request, mine.get(index)) for index, request in enumerate(requests)]

    def _encode(self, rows: torch.Tensor, batch: MicroBatch, request: ScoreRequest) -> torch.Tensor:
        if isinstance(self.payload_format, HiddenStatePayload):
            return self.payload_format.encode(rows)
        labels = batch.target_ids.clone()
        ends = torch.tensor([len(sample.response_ids) for sample in batch.samples]).cumsum(0).tolist()
        dealt = request.samples[self.parallel.dp_rank :: self.parallel.dp_size]
        for end, sample in zip(ends, dealt, strict=True):
            if sample.target_id >= 0 and sample.response:
                labels[end - 1] = sample.target_id
        found = top_k_of_hidden(
            rows,
            output_weight(self.model),
            batch.target_ids,
            labels,
            top_k=self.payload_format.k,
            vocab_size=self._vocab_size,
            group=self.parallel.tp_group,
        )
        return self.payload_format.encode(found)

    def _collect(self, request: ScoreRequest, mine: torch.Tensor | None) -> torch.Tensor:
        """The rows of all samples, in their order, on the main rank; nothing elsewhere."""
        if not self.parallel.is_main:
            if mine is not None and mine.numel():
                dist.send(mine, 0)
            return torch.empty(0, self.payload_format.bytes_per_token, dtype=torch.uint8)
        size = self.parallel.dp_size
        parts: list[Sequence[torch.Tensor]] = []
        for dp_rank in range(size):
            lengths = [sample.response for sample in request.samples[dp_rank::size]]
            source, part = self._speakers[dp_rank], mine
            if source or part is None:
                part = torch.empty(sum(lengths), self.payload_format.bytes_per_token, dtype=torch.uint8)
                if part.numel():
                    dist.recv(part, source)
            if size == 1:
                return part
            parts.append(part.split(lengths))
        return torch.cat([parts[i % size][i // size] for i in range(len(request.samples))])


def request_samples(request: ScoreRequest) -> list[Sample]:
    """The request's samples as micro-batches take them."""
    ids = request.token_ids.tolist()
    found, start = [], 0
    for sample in request.samples:
        middle, end = start + sample.prompt, start + sample.prompt + sample.response
        found.append(Sample(Prompt("", tuple(ids[start:middle]), {}), ids[middle:end], "length", [], 0))
        start = end
    return found
