"""`eaopd teach` on one rank: the model is built, rank 0 listens, and all ranks score until a signal comes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.schema import TeacherConfig as Options
from eaopd_megatron.config.schema import select_separate_teacher, teacher_key
from eaopd_megatron.distributed import parallel_state as groups
from eaopd_megatron.distributed.broadcast import broadcast_events
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.heartbeat import heartbeat_monitor
from eaopd_megatron.distributed.parallel_state import ParallelLayout, ParallelState
from eaopd_megatron.errors import StopRequested, UserError
from eaopd_megatron.megatron.layers import require_fp8_support
from eaopd_megatron.megatron.model import DTYPES, build_model
from eaopd_megatron.models.supported import check_supported, separate_layout
from eaopd_megatron.serving.http import read_api_key
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.protocol import ScoreRequest, TeacherInfo, build_teacher_info
from eaopd_megatron.teacher.service.listener import RequestQueue, TeacherHttpServer
from eaopd_megatron.teacher.service.scorer import TeacherScorer
from eaopd_megatron.utils.log import log_rank0

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 60.0
_DRAIN_SECONDS = 30.0
"""What clients have to receive what is scored, once the teacher is asked to stop."""


def serve_teacher(recipe: Recipe, name: str) -> None:
    """Serves until a signal comes, then raises SystemExit(128 + its number). Raises UserError."""
    options, key = select_separate_teacher(recipe, name), teacher_key(name)
    if options.precision == "fp8":
        require_fp8_support(f"{key}.precision")
    folder = HfFolder.open(options.model, f"{key}.model")
    layout = separate_layout(options.parallel_layout, has_experts=folder.family.has_experts)
    check_supported(folder.config, layout, f"{key}.model: {options.model}")
    started, needed = int(os.environ["WORLD_SIZE"]), options.parallel_layout.min_world_size
    if started != needed:
        raise UserError(
            f"{key}.tensor_parallel, pipeline_ and expert_parallel take {needed} ranks; {started} were started"
        )
    parallel, store = groups.init_distributed(
        layout, seed=recipe.seed, timeout_minutes=recipe.distributed.timeout_minutes
    )
    with heartbeat_monitor(store, parallel.rank, parallel.world_size):
        listener = run_on_all_or_raise(parallel, lambda: _listen(options) if parallel.is_main else None)
        info, scorer = _build(recipe, options, folder, parallel)
        _serve(scorer, info, listener, options.max_concurrent_requests)
    groups.shutdown_distributed()


def _listen(options: Options) -> TeacherHttpServer:
    return TeacherHttpServer(
        options.listen, None if options.api_key_file is None else read_api_key(Path(options.api_key_file))
    )


def _build(
    recipe: Recipe, options: Options, folder: HfFolder, parallel: ParallelState
) -> tuple[TeacherInfo, TeacherScorer]:
    """What this teacher is to clients, and its model."""
    student = HfFolder.open(recipe.student.model, "student.model")
    info = build_teacher_info(recipe, options, student, folder, layout=_shown(parallel.layout))
    # hidden states become logits at the student's ranks, whose copy of the output layer is the one that is mapped
    row_map = TerminalMap(*info.terminal).row_map() if info.signal == "topk" else None
    precision, fp8 = DTYPES[options.precision], options.precision == "fp8"
    model = build_model(folder.config, parallel.layout, precision, untie=row_map is not None, fp8=fp8)
    load_hf(model, folder, parallel, row_map=row_map)
    return info, TeacherScorer(model, parallel, info.payload_format, vocab_size=info.vocab_size)


def _serve(scorer: TeacherScorer, info: TeacherInfo, listener: TeacherHttpServer | None, places: int) -> None:
    parallel, queue, received = scorer.parallel, RequestQueue(places), list[int]()

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    meter = ThroughputMeter()
    if listener is not None:
        listener.begin(queue, info)
        log_rank0(f"{info.model} serves {info.signal} at {listener.url} ({info.layout})")
    news = _next_requests(queue, scorer.max_batch, meter) if parallel.is_main else None
    try:
        for requests in broadcast_events(parallel, news, lambda: received[0] if received else 0):
            rows = scorer.score(requests)
            if parallel.is_main:
                queue.finish(requests, rows)
                meter.add(requests)
    except StopRequested as asked:
        queue.stop()
        if listener is not None:
            queue.drain(_DRAIN_SECONDS)
            listener.end()
        raise SystemExit(128 + asked.args[0]) from None


def _next_requests(queue: RequestQueue, together: int, meter: ThroughputMeter) -> Iterator[list[ScoreRequest] | None]:
    """What is to be scored next, for `broadcast_events`."""
    while True:
        yield queue.take(together, _POLL_SECONDS) or None
        meter.tick()


class ThroughputMeter:
    """Says now and then what was done, if anything was."""

    def __init__(self, seconds: float = _REPORT_SECONDS, report: Callable[[str], None] = log_rank0) -> None:
        self._seconds, self._report = seconds, report
        self._since = time.monotonic()
        self._requests = self._tokens = 0

    def add(self, requests: Sequence[ScoreRequest]) -> None:
        """These are scored."""
        self._requests += len(requests)
        self._tokens += sum(len(request.token_ids) for request in requests)

    def tick(self) -> None:
        """Called all the time."""
        past = time.monotonic() - self._since
        if past < self._seconds:
            return
        if self._requests:
            rate = self._tokens / past
            self._report(f"{self._requests} requests, {self._tokens} tokens in {past:.0f} s: {rate:.0f} tokens/s")
        self._since += past
        self._requests = self._tokens = 0


def _shown(layout: ParallelLayout) -> str:
    sizes = {name: getattr(layout, f"{name}_parallel") for name in ("tensor", "pipeline", "expert")}
    return " x ".join(f"{name} {size}" for name, size in sizes.items())
