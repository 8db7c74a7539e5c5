"""A teacher that lives elsewhere, as the student's ranks see it: asked while responses are still written, waited for
before they are learned from.

The requests of a data-parallel copy are dealt over its ranks of the last pipeline stage, and each pulls its own share.
What came is bytes in host memory on the rank that pulled it; it is exchanged where it is needed.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_output_head
from eaopd_megatron.config.schema import TeacherConfig as Options
from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.distributed.broadcast import broadcast_events, wait_on_all_ranks
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.model import DTYPES
from eaopd_megatron.objective import TeacherHidden
from eaopd_megatron.serving.http import FUTURE_POLL_SECONDS, EventLoopThread, poll_until_done, read_api_key
from eaopd_megatron.serving.pool import C, L, PoolCall, ServerPool
from eaopd_megatron.serving.supervisor import wait_until_any_ready
from eaopd_megatron.teacher.base import TeacherSignal, require_row_count
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.payload import PayloadFormat, TopKPayload, load_top_k, store_top_k


def load_teacher_head(
    folder: HfFolder,
    parallel: ParallelState,
    *,
    student_rows: int,
    vocab_size: int,
    precision: str,
    terminal: TerminalMap,
) -> torch.Tensor | None:
    """This rank's rows of the teacher's head in the student's layout and padding [V_padded/tp, h_T], under the terminal
    map; None before the last pipeline stage.

    student_rows: the student's vocabulary without padding. vocab_size: that of both models, beyond which the rows are
    padding. precision: of the teacher's scoring; its hidden states are multiplied in it ("fp8" is of the weights of
    layers alone: the head is bf16 then). Raises UserError where the folder does not hold what its config.json says.
    """
    if not parallel.is_last_stage:
        return None
    head = load_output_head(
        folder,
        tp_rank=parallel.tp_rank,
        tp_size=parallel.tp_size,
        rows=student_rows,
        vocab_size=vocab_size,
        row_map=terminal.row_map(),
    )
    return head.to(parallel.device, DTYPES.get(precision, torch.bfloat16))


_KIND = "teacher replica"
"""What messages call one."""


class ScoringBackend(Protocol[C, L]):
    """What a placement must give: how its servers are asked."""

    def calls(
        self, samples: Sequence[Sample], number: str
    ) -> Sequence[tuple[PoolCall[C, L, torch.Tensor], Sequence[Sample]]]:
        """The samples, each with at least one response token, as calls. number: begins the ids of them all; unique over
        the run.

        A call answers the rows [response tokens of its samples, rows.bytes] uint8, sample after sample. Making one
        costs little: every rank makes all of its copy's and runs its share.
        """

    def client(self, url: str, key: str | None) -> C:
        """Raises UserError for a URL that is none."""

    async def validate(self, client: C, longest: int) -> L:
        """What the server can take. longest: tokens of a prompt and its response together, at the most. Raises
        ServerGone or Busy (not yet) or UserError (another teacher than the recipe's)."""


class ReplicaManager(Protocol):
    """The servers that the main rank starts."""

    def start(self, longest: int) -> None:
        """Begins to start them."""

    def wait_urls(self) -> Generator[None, None, list[str]]:
        """Yields while they are not there, at least a few times a second; its result are their URLs. Raises
        UserError."""

    @property
    def api_key(self) -> str | None:
        """What they want in the Authorization header."""

    def close(self) -> None:
        """Ends them. A second call does nothing."""


class RemoteTeacher(Generic[C, L]):
    """`interface.Teacher` by servers."""

    def __init__(
        self,
        parallel: ParallelState,
        backend: ScoringBackend[C, L],
        *,
        payload_format: PayloadFormat,
        head: torch.Tensor | None,
        terminal: TerminalMap,
        replicas: ReplicaManager | None,
        options: Options,
        stop_signal: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """rows: format of the answers. head: for hidden states, on the last pipeline stage, the teacher's output head
        in the student's layout [V_padded/tp, h_T]. replicas: on the main rank, where the trainer starts them. asked:
        the number of a signal that asks the run to stop, or 0."""
        self.parallel, self.payload_format, self.head, self.terminal = parallel, payload_format, head, terminal
        self._backend, self._replicas, self._options = backend, replicas, options
        self._stop_signal, self._report = stop_signal, report if parallel.is_main else _in_silence
        self._loop = EventLoopThread("teacher")
        self._pool: ServerPool[C, L] | None = None
        self._max_tokens = 0
        self._run_id = f"{secrets.token_hex(6)}-{parallel.rank}"
        self._submissions = itertools.count()
        self._num_calls = 0  # calls of this copy, over all its ranks
        self._fetches: list[Future[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._payloads: dict[int, torch.Tensor] = {}  # by Sample.index: rows that came and are not used yet

    def start(self, max_tokens: int) -> None:
        """As `Teacher.start`. Collective. Raises UserError on all ranks."""
        self._max_tokens = max_tokens
        run_on_all_or_raise(self.parallel, lambda: None if self._replicas is None else self._replicas.start(max_tokens))

    def open(self) -> None:
        """As `Teacher.open`; returns once a replica is ready. Collective. Raises StopRequested, ServiceUnavailable or
        RuntimeError on all ranks."""
        self._loop.__enter__()
        news = self._wait_for_replicas() if self.parallel.is_main else None
        ((urls, key),) = broadcast_events(self.parallel, news, self._stop_signal)
        opening = None
        if self.parallel.is_last_stage or self.parallel.is_main:  # the main rank tells what becomes of the replicas
            opening = self._run_in_background(self._open_pool([self._backend.client(url, key) for url in urls]))
        wait_on_all_ranks(self.parallel, lambda: opening is None or _done([opening]), self._stop_signal)

    def submit(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.ask`: the requests run in the background."""
        wanted = [sample for sample in samples if sample.response_ids]
        if not self.parallel.is_last_stage or not wanted:
            return
        assert self._pool is not None, "open comes first"
        calls = self._backend.calls(wanted, f"{self._run_id}-{next(self._submissions)}")
        for call, of in calls:
            if self._num_calls % self.parallel.tp_cp_size == self.parallel.tp_cp_rank:
                self._fetches.append(self._run_in_background(self._fetch(self._pool, call, of)))
            self._num_calls += 1

    def wait(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.wait`."""
        wait_on_all_ranks(self.parallel, lambda: _done(self._fetches), self._stop_signal)
        self._fetches.clear()
        if self.parallel.is_last_stage and isinstance(self.payload_format, TopKPayload):
            store_top_k(samples, self.payload_format.decode(self._gather_payload(samples)))
        else:
            self._require_one_row_per_token(samples)

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """As `Teacher.signals`. The rows of a micro-batch are exchanged, and leave the host's memory, when it is
        asked for."""
        if isinstance(self.payload_format, TopKPayload):
            top_k = self.payload_format
            return lambda index: load_top_k(batches[index], top_k)
        hidden = self.payload_format

        def of(index: int) -> TeacherHidden:
            assert self.head is not None
            batch = batches[index]
            return TeacherHidden(hidden.decode(batch.gather_local([self._gather_payload(batch.samples)])), self.head)

        return of

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        """As `Teacher.labels`."""
        return None if isinstance(self.payload_format, TopKPayload) else self.terminal.batch_target_ids(batch)

    def close(self) -> None:
        """As `Teacher.close`: what is still asked for is given up, replicas that were started here end."""
        if self._loop.running:
            self._loop.run(self._cancel_and_close())
            self._loop.__exit__()
        self._fetches.clear()
        self._payloads.clear()
        if self._replicas is not None:
            self._replicas.close()

    def _gather_payload(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The rows [response tokens, rows.bytes] uint8 of all samples, on every rank of the stage; the owners forget
        theirs. Collective over the stage's tensor- and context-parallel ranks."""
        self._require_one_row_per_token(samples)
        lengths = [len(sample.response_ids) for sample in samples]
        everything = torch.zeros(
            sum(lengths), self.payload_format.bytes_per_token, dtype=torch.uint8, device=self.parallel.device
        )
        for sample, place in zip(samples, everything.split(lengths), strict=True):
            mine = self._payloads.pop(sample.index, None)
            if mine is not None:
                place.copy_(mine)
        if self.parallel.tp_cp_size > 1 and len(everything):
            dist.all_reduce(everything, group=self.parallel.tp_cp_group)  # every byte is of one rank, 0 elsewhere
        return everything

    def _require_one_row_per_token(self, samples: Sequence[Sample]) -> None:
        """Raises RuntimeError where not every response token has one row on one rank of the stage."""
        if not self.parallel.is_last_stage or not samples:
            return
        found = torch.tensor([len(self._payloads.get(s.index, ())) for s in samples], device=self.parallel.device)
        if self.parallel.tp_cp_size > 1:
            dist.all_reduce(found, group=self.parallel.tp_cp_group)
        for sample, count in zip(samples, found.tolist(), strict=True):
            require_row_count(sample, count)

    def _run_in_background(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """It runs in the event loop, until `close` at the latest."""

        async def known() -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await work

        return self._loop.submit(known())

    # On the main rank, before there is a pool

    def _wait_for_replicas(self) -> Iterator[tuple[list[str], str | None] | None]:
        """News for `broadcast_events`: at last, where the replicas are and the key that they want."""
        options = self._options
        if self._replicas is None:
            urls, key = options.urls, None if options.api_key_file is None else read_api_key(Path(options.api_key_file))
        else:
            urls = yield from self._replicas.wait_urls()
            key = self._replicas.api_key
        clients = [self._backend.client(url, key) for url in urls]
        admit = partial(self._backend.validate, longest=self._max_tokens)
        yield from poll_until_done(self._run_in_background(self._wait_until_ready(clients, admit)))
        yield urls, key

    # In the event loop

    async def _wait_until_ready(self, clients: Sequence[C], admit: Callable[[C], Awaitable[L]]) -> None:
        try:
            await wait_until_any_ready(
                clients, admit, kind=_KIND, minutes=self._options.startup_timeout_minutes, report=self._report
            )
        finally:
            for client in clients:
                await client.close()

    async def _open_pool(self, clients: Sequence[C]) -> None:
        admit = partial(self._backend.validate, longest=self._max_tokens)
        all_down = 60 * self._options.unavailable_timeout_minutes
        self._pool = ServerPool(clients, admit, kind=_KIND, unavailable_timeout=all_down, report=self._report)
        await self._pool.open()

    async def _fetch(
        self, pool: ServerPool[C, L], call: PoolCall[C, L, torch.Tensor], samples: Sequence[Sample]
    ) -> None:
        async for rows in pool.run([call]):
            parts = rows.split([len(sample.response_ids) for sample in samples])
            for sample, part in zip(samples, parts, strict=True):
                if sample.index in self._payloads:
                    raise RuntimeError(f"prompt {sample.prompt.id}: it was scored twice")
                self._payloads[sample.index] = part

    async def _cancel_and_close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._pool is not None:
            await self._pool.close()


def _done(work: Sequence[Future[None]]) -> bool:
    """Whether all of it is, after POLL_SECONDS at the most. Raises what one of them raised."""
    finished, running = wait(work, FUTURE_POLL_SECONDS, FIRST_EXCEPTION)
    for one in finished:
        one.result()
    return not running


def _in_silence(text: str) -> None:
    """The main rank says it."""
