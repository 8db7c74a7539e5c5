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
from eaopd_megatron.serving.client import read_api_key
from eaopd_megatron.serving.pool import C, L, PoolCall, ServerPool
from eaopd_megatron.serving.readiness import FUTURE_POLL_SECONDS, Arrival, EventLoopThread, poll_until_done
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.interface import TeacherSignal, require_count
from eaopd_megatron.teacher.payload import Rows, TopKRows, keep, kept


def load_head(
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


KIND = "teacher replica"
"""What messages call one."""


class Source(Protocol[C, L]):
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

    async def admit(self, client: C, longest: int) -> L:
        """What the server can take. longest: tokens of a prompt and its response together, at the most. Raises
        ServerGone or Busy (not yet) or UserError (another teacher than the recipe's)."""


class Replicas(Protocol):
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
        source: Source[C, L],
        *,
        rows: Rows,
        head: torch.Tensor | None,
        terminal: TerminalMap,
        replicas: Replicas | None,
        options: Options,
        asked: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """rows: format of the answers. head: for hidden states, on the last pipeline stage, the teacher's output head
        in the student's layout [V_padded/tp, h_T]. replicas: on the main rank, where the trainer starts them. asked:
        the number of a signal that asks the run to stop, or 0."""
        self.parallel, self.rows, self.head, self.terminal = parallel, rows, head, terminal
        self._source, self._replicas, self._options = source, replicas, options
        self._asked, self._report = asked, report if parallel.is_main else _in_silence
        self._loop = EventLoopThread("teacher")
        self._pool: ServerPool[C, L] | None = None
        self._longest = 0
        self._run = f"{secrets.token_hex(6)}-{parallel.rank}"
        self._asks = itertools.count()
        self._dealt = 0  # calls of this copy, over all its ranks
        self._pulls: list[Future[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pulled: dict[int, torch.Tensor] = {}  # by Sample.index: rows that came and are not used yet

    def start(self, longest: int) -> None:
        """As `Teacher.start`. Collective. Raises UserError on all ranks."""
        self._longest = longest
        run_on_all_or_raise(self.parallel, lambda: None if self._replicas is None else self._replicas.start(longest))

    def open(self) -> None:
        """As `Teacher.open`; returns once a replica is ready. Collective. Raises StopRequested, ServiceUnavailable or
        RuntimeError on all ranks."""
        self._loop.__enter__()
        news = self._arrival() if self.parallel.is_main else None
        ((urls, key),) = broadcast_events(self.parallel, news, self._asked)
        opening = None
        if self.parallel.is_last_stage or self.parallel.is_main:  # the main rank tells what becomes of the replicas
            opening = self._begin(self._open([self._source.client(url, key) for url in urls]))
        wait_on_all_ranks(self.parallel, lambda: opening is None or _done([opening]), self._asked)

    def ask(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.ask`: the requests run in the background."""
        wanted = [sample for sample in samples if sample.response_ids]
        if not self.parallel.is_last_stage or not wanted:
            return
        assert self._pool is not None, "open comes first"
        calls = self._source.calls(wanted, f"{self._run}-{next(self._asks)}")
        for call, of in calls:
            if self._dealt % self.parallel.tp_cp_size == self.parallel.tp_cp_rank:
                self._pulls.append(self._begin(self._pull(self._pool, call, of)))
            self._dealt += 1

    def wait(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.wait`."""
        wait_on_all_ranks(self.parallel, lambda: _done(self._pulls), self._asked)
        self._pulls.clear()
        if self.parallel.is_last_stage and isinstance(self.rows, TopKRows):
            keep(samples, self.rows.decode(self._exchanged(samples)))
        else:
            self._require_each_once(samples)

    def signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """As `Teacher.signals`. The rows of a micro-batch are exchanged, and leave the host's memory, when it is
        asked for."""
        if isinstance(self.rows, TopKRows):
            top_k = self.rows
            return lambda index: kept(batches[index], top_k)
        hidden = self.rows

        def of(index: int) -> TeacherHidden:
            assert self.head is not None
            batch = batches[index]
            return TeacherHidden(hidden.decode(batch.gather_local([self._exchanged(batch.samples)])), self.head)

        return of

    def labels(self, batch: MicroBatch) -> torch.Tensor | None:
        """As `Teacher.labels`."""
        return None if isinstance(self.rows, TopKRows) else self.terminal.labels(batch)

    def close(self) -> None:
        """As `Teacher.close`: what is still asked for is given up, replicas that were started here end."""
        if self._loop.running:
            self._loop.run(self._shut())
            self._loop.__exit__()
        self._pulls.clear()
        self._pulled.clear()
        if self._replicas is not None:
            self._replicas.close()

    def _exchanged(self, samples: Sequence[Sample]) -> torch.Tensor:
        """The rows [response tokens, rows.bytes] uint8 of all samples, on every rank of the stage; the owners forget
        theirs. Collective over the stage's tensor- and context-parallel ranks."""
        self._require_each_once(samples)
        lengths = [len(sample.response_ids) for sample in samples]
        everything = torch.zeros(sum(lengths), self.rows.bytes, dtype=torch.uint8, device=self.parallel.device)
        for sample, place in zip(samples, everything.split(lengths), strict=True):
            mine = self._pulled.pop(sample.index, None)
            if mine is not None:
                place.copy_(mine)
        if self.parallel.tp_cp_size > 1 and len(everything):
            dist.all_reduce(everything, group=self.parallel.tp_cp_group)  # every byte is of one rank, 0 elsewhere
        return everything

    def _require_each_once(self, samples: Sequence[Sample]) -> None:
        """Raises RuntimeError where not every response token has one row on one rank of the stage."""
        if not self.parallel.is_last_stage or not samples:
            return
        found = torch.tensor([len(self._pulled.get(s.index, ())) for s in samples], device=self.parallel.device)
        if self.parallel.tp_cp_size > 1:
            dist.all_reduce(found, group=self.parallel.tp_cp_group)
        for sample, count in zip(samples, found.tolist(), strict=True):
            require_count(sample, count)

    def _begin(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        """It runs in the event loop, until `close` at the latest."""

        async def known() -> None:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await work

        return self._loop.submit(known())

    # On the main rank, before there is a pool

    def _arrival(self) -> Iterator[tuple[list[str], str | None] | None]:
        """News for `broadcast_events`: at last, where the replicas are and the key that they want."""
        options = self._options
        if self._replicas is None:
            urls, key = options.urls, None if options.api_key_file is None else read_api_key(Path(options.api_key_file))
        else:
            urls = yield from self._replicas.wait_urls()
            key = self._replicas.api_key
        clients = [self._source.client(url, key) for url in urls]
        admit = partial(self._source.admit, longest=self._longest)
        yield from poll_until_done(self._begin(self._until_there(clients, admit)))
        yield urls, key

    # In the event loop

    async def _until_there(self, clients: Sequence[C], admit: Callable[[C], Awaitable[L]]) -> None:
        try:
            await Arrival(KIND, self._options.start_minutes, self._report).of_all(clients, admit)
        finally:
            for client in clients:
                await client.close()

    async def _open(self, clients: Sequence[C]) -> None:
        admit = partial(self._source.admit, longest=self._longest)
        all_down = 60 * self._options.all_down_minutes
        self._pool = ServerPool(clients, admit, kind=KIND, unavailable_timeout=all_down, report=self._report)
        await self._pool.open()

    async def _pull(
        self, pool: ServerPool[C, L], call: PoolCall[C, L, torch.Tensor], samples: Sequence[Sample]
    ) -> None:
        async for rows in pool.run([call]):
            parts = rows.split([len(sample.response_ids) for sample in samples])
            for sample, part in zip(samples, parts, strict=True):
                if sample.index in self._pulled:
                    raise RuntimeError(f"prompt {sample.prompt.id}: it was scored twice")
                self._pulled[sample.index] = part

    async def _shut(self) -> None:
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
