"""`eaopd teach` on one rank: build the model, listen on rank 0, and score on all ranks until a signal comes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.schema import TeacherConfig, select_separate_teacher, teacher_key
from eaopd_megatron.data.packing import collate
from eaopd_megatron.data.types import MicroBatch, Prompt, Sample
from eaopd_megatron.distributed.broadcast import broadcast_events
from eaopd_megatron.distributed.collective_errors import run_on_main_or_raise
from eaopd_megatron.distributed.heartbeat import heartbeat_monitor
from eaopd_megatron.distributed.parallel_state import (
    ParallelState,
    gather_objects,
    init_distributed,
    shutdown_distributed,
)
from eaopd_megatron.errors import StopRequested, UserError
from eaopd_megatron.megatron.forward import output_weight
from eaopd_megatron.megatron.layers import attention_in_use, require_fp8_support
from eaopd_megatron.megatron.model import DTYPES, ModelChunks, build_model
from eaopd_megatron.megatron.pipeline import packing_for, run_forward
from eaopd_megatron.models.supported import check_supported, separate_layout
from eaopd_megatron.serving.http import read_api_key
from eaopd_megatron.teacher.colocated import top_k_of_hidden
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import HiddenStatePayload, PayloadFormat
from eaopd_megatron.teacher.protocol import ScoreRequest, TeacherInfo, build_teacher_info
from eaopd_megatron.teacher.service.listener import RequestQueue, TeacherHttpServer
from eaopd_megatron.utils.log import log_rank0

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 60.0
_DRAIN_SECONDS = 30.0
"""Seconds for clients to receive finished answers after a signal."""


def serve_teacher(recipe: Recipe, name: str) -> None:
    """Serve until a signal comes, then raise SystemExit(128 + its number). Raises UserError."""
    config, key = select_separate_teacher(recipe, name), teacher_key(name)
    if config.precision == "fp8":
        require_fp8_support(f"{key}.precision")
    folder = HfFolder.open(config.model, f"{key}.model")
    layout = separate_layout(config.parallel_layout, has_experts=folder.family.has_experts)
    check_supported(folder.config, layout, f"{key}.model: {config.model}")
    started, needed = int(os.environ["WORLD_SIZE"]), config.parallel_layout.min_world_size
    if started != needed:
        raise UserError(
            f"{key}.tensor_parallel, pipeline_ and expert_parallel take {needed} ranks; {started} were started"
        )
    parallel, store = init_distributed(layout, seed=recipe.seed, timeout_minutes=recipe.distributed.timeout_minutes)
    with heartbeat_monitor(store, parallel.rank, parallel.world_size):
        listener = run_on_main_or_raise(parallel, lambda: _listen(config))
        info, scorer = _build(recipe, config, folder, parallel)
        _serve(scorer, info, listener, config.max_concurrent_requests)
    shutdown_distributed()


def _listen(config: TeacherConfig) -> TeacherHttpServer:
    key = None if config.api_key_file is None else read_api_key(Path(config.api_key_file))
    return TeacherHttpServer(config.listen, key)


def _build(
    recipe: Recipe, config: TeacherConfig, folder: HfFolder, parallel: ParallelState
) -> tuple[TeacherInfo, TeacherScorer]:
    """Return the description of this teacher for clients, and its model."""
    student = HfFolder.open(recipe.student.model, "student.model")
    sizes = [f"{name} {getattr(parallel.layout, f'{name}_parallel')}" for name in ("tensor", "pipeline", "expert")]
    terminal = TerminalMap.of_folders(config, student, folder)
    info = build_teacher_info(recipe, config, student, folder, terminal, layout=" x ".join(sizes))
    # hidden states become logits on the student's ranks, which map their copy of the output layer
    row_map = info.terminal_map.row_map() if info.signal == "topk" else None
    dtype, fp8 = DTYPES[config.precision], config.precision == "fp8"
    model = build_model(folder.config, parallel.layout, dtype, untie=row_map is not None, fp8=fp8)
    load_hf(model, folder, parallel, row_map=row_map)
    log_rank0(attention_in_use(model.config))
    return info, TeacherScorer(
        model, parallel, info.payload_format, vocab_size=info.vocab_size, masked_ids=info.masked_ids
    )


def _serve(scorer: TeacherScorer, info: TeacherInfo, listener: TeacherHttpServer | None, capacity: int) -> None:
    parallel, queue, received = scorer.parallel, RequestQueue(capacity), list[int]()

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    meter = ScoringMeter()
    if listener is not None:
        listener.start(queue, info)
        log_rank0(f"{info.model} serves {info.signal} at {listener.url} ({info.layout})")
    events = _next_requests(queue, scorer.max_batch, meter) if parallel.is_main else None
    try:
        for requests in broadcast_events(parallel, events, lambda: received[0] if received else 0):
            payloads = scorer.score(requests)
            if parallel.is_main:
                queue.finish(requests, payloads)
                meter.add(requests)
    except StopRequested as stop:
        queue.stop()
        if listener is not None:
            queue.drain(_DRAIN_SECONDS)
            listener.stop()
        raise SystemExit(128 + stop.args[0]) from None


def _next_requests(queue: RequestQueue, max_batch: int, meter: ScoringMeter) -> Iterator[list[ScoreRequest] | None]:
    """Yield the requests to score next, or None: events for `broadcast_events`."""
    while True:
        yield queue.take(max_batch, _POLL_SECONDS) or None
        meter.tick()


class ScoringMeter:
    """Logs the throughput at intervals in which something was scored."""

    def __init__(self, seconds: float = _REPORT_SECONDS, report: Callable[[str], None] = log_rank0) -> None:
        self._seconds, self._report = seconds, report
        self._since = time.monotonic()
        self._requests = self._tokens = 0

    def add(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests += len(requests)
        self._tokens += sum(len(request.token_ids) for request in requests)

    def tick(self) -> None:
        """Log if the interval is over. Call it often."""
        elapsed = time.monotonic() - self._since
        if elapsed < self._seconds:
            return
        if self._requests:
            rate = self._tokens / elapsed
            self._report(f"{self._requests} requests, {self._tokens} tokens in {elapsed:.0f} s: {rate:.0f} tokens/s")
        self._since += elapsed
        self._requests = self._tokens = 0


class TeacherScorer:
    """The teacher's model on the service's ranks. All ranks make the same calls.

    Every request is one micro-batch: its payload has the same bits whatever else is scored with it. If experts need
    data-parallel ranks, a request's samples are distributed over them, always in the same way.
    """

    def __init__(
        self,
        model: ModelChunks,
        parallel: ParallelState,
        payload_format: PayloadFormat,
        *,
        vocab_size: int,
        masked_ids: Sequence[int] = (),
    ) -> None:
        """vocab_size: ids over which top-k log-probs are normalised, without masked_ids. Collective."""
        self._masked_ids = masked_ids
        self.model = model.eval().requires_grad_(False)
        self.parallel, self.payload_format, self._vocab_size = parallel, payload_format, vocab_size
        ranks = gather_objects((parallel.reports_metrics, parallel.dp_rank), parallel.world_size)
        self._senders = {dp_rank: rank for rank, (sends, dp_rank) in enumerate(ranks) if sends}

    @property
    def max_batch(self) -> int:
        """Requests per forward pass: enough to keep a pipeline busy, else one, for a low latency."""
        return 1 if self.parallel.pp_size == 1 else 4 * self.parallel.pp_size

    def score(self, requests: Sequence[ScoreRequest]) -> list[torch.Tensor]:
        """Return each request's payload [response tokens, bytes_per_token] uint8 in host memory on the main rank, empty
        tensors on the others. Collective."""
        parallel = self.parallel
        packing = packing_for(parallel.layout)
        batches = [
            collate(request_samples(request)[parallel.dp_rank :: parallel.dp_size], parallel.device, packing)
            for request in requests
        ]
        payloads: dict[int, torch.Tensor] = {}

        def on_last_stage(index: int, hidden: torch.Tensor) -> None:
            payload = self._encode(hidden, batches[index], requests[index])
            if parallel.reports_metrics:
                payloads[index] = payload.cpu()

        run_forward(self.model, batches, on_last_stage)
        return [self._collect(request, payloads.get(index)) for index, request in enumerate(requests)]

    def _encode(self, hidden: torch.Tensor, batch: MicroBatch, request: ScoreRequest) -> torch.Tensor:
        if isinstance(self.payload_format, HiddenStatePayload):
            return self.payload_format.encode(hidden)
        targets = batch.target_ids.clone()
        ends = torch.tensor([len(sample.response_ids) for sample in batch.samples]).cumsum(0).tolist()
        own = request.samples[self.parallel.dp_rank :: self.parallel.dp_size]
        for end, sample in zip(ends, own, strict=True):
            if sample.target_id >= 0 and sample.response:
                targets[end - 1] = sample.target_id
        top_k = top_k_of_hidden(
            hidden,
            output_weight(self.model),
            batch.target_ids,
            targets,
            top_k=self.payload_format.k,
            vocab_size=self._vocab_size,
            group=self.parallel.tp_group,
            masked_ids=self._masked_ids,
        )
        return self.payload_format.encode(top_k)

    def _collect(self, request: ScoreRequest, local: torch.Tensor | None) -> torch.Tensor:
        """Send the local payload to the main rank, and return there all samples' payload in their order."""
        width = self.payload_format.bytes_per_token
        if not self.parallel.is_main:
            if local is not None and local.numel():
                dist.send(local, 0)
            return torch.empty(0, width, dtype=torch.uint8)
        size = self.parallel.dp_size
        parts: list[Sequence[torch.Tensor]] = []
        for dp_rank in range(size):
            lengths = [sample.response for sample in request.samples[dp_rank::size]]
            sender, part = self._senders[dp_rank], local
            if sender or part is None:
                part = torch.empty(sum(lengths), width, dtype=torch.uint8)
                if part.numel():
                    dist.recv(part, sender)
            if size == 1:
                return part
            parts.append(part.split(lengths))
        return torch.cat([parts[i % size][i // size] for i in range(len(request.samples))])


def request_samples(request: ScoreRequest) -> list[Sample]:
    """Return the request's samples in the form that `collate` takes."""
    ids = iter(request.token_ids.tolist())
    return [
        Sample(Prompt("", tuple(islice(ids, one.prompt)), {}), list(islice(ids, one.response)), "length", [], 0)
        for one in request.samples
    ]
