"""A teacher on servers, as the student's ranks use it, and its output head on those ranks."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Protocol

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_output_head
from eaopd_megatron.config.schema import TeacherConfig
from eaopd_megatron.data.types import MicroBatch, Sample
from eaopd_megatron.distributed.broadcast import broadcast_events, wait_on_all_ranks
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.model import DTYPES
from eaopd_megatron.objective import TeacherHidden
from eaopd_megatron.serving.http import FUTURE_POLL_SECONDS, EventLoopThread, poll_until_done, read_api_key
from eaopd_megatron.serving.pool import C, L, PoolCall, ServerPool
from eaopd_megatron.serving.supervisor import wait_until_any_ready
from eaopd_megatron.teacher.answer_checks import AnswerChecks, AnswerFormat
from eaopd_megatron.teacher.base import TeacherSignal, require_row_count
from eaopd_megatron.teacher.eos_map import TerminalMap, mask_head, mask_hidden
from eaopd_megatron.teacher.payload import PayloadFormat, TopKPayload, gather_top_k, split_top_k
from eaopd_megatron.teacher.replicas import REPLICA_KIND, TeacherReplicas


def load_teacher_head(
    folder: HfFolder,
    parallel: ParallelState,
    *,
    student_rows: int,
    vocab_size: int,
    precision: str,
    terminal: TerminalMap,
) -> torch.Tensor | None:
    """Return this rank's rows of the teacher's output weight in the student's layout and padding [V_padded/tp, h_T],
    under the terminal map; None before the last pipeline stage.

    student_rows: the student's vocabulary without padding. vocab_size: ids that both models have; later rows are
    padding. precision: of the teacher's scoring, in which the hidden states are multiplied; the head of an "fp8"
    teacher is bf16. Raises UserError if the folder does not hold what its config.json says.
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
    head = head.to(parallel.device, DTYPES.get(precision, torch.bfloat16))
    return mask_head(head, terminal.masked_ids, parallel.tp_rank)


class ScoringBackend(Protocol[C, L]):
    """What a placement provides: how its servers are asked to score."""

    @property
    def payload_format(self) -> PayloadFormat:
        """Format of the answers."""

    @property
    def answer_format(self) -> AnswerFormat:
        """Vocabulary of the answers."""

    @property
    def terminal(self) -> TerminalMap: ...

    def calls(
        self, samples: Sequence[Sample], number: str
    ) -> Sequence[tuple[PoolCall[C, L, torch.Tensor], Sequence[Sample]]]:
        """Return the calls that score the samples, each with at least one response token, and the samples of each call.

        A call answers [response tokens of its samples, bytes_per_token] uint8, sample after sample. number: prefix of
        the calls' ids, unique in the run. Creating a call must be cheap: every rank creates all calls of its copy and
        runs its share.
        """

    def client(self, url: str, key: str | None) -> C:
        """Return a client. Raises UserError for an invalid URL."""

    async def validate(self, client: C, longest: int) -> L:
        """Return the server's limits. longest: upper bound of the tokens of a prompt and its response together.

        Raises ServerGone or Busy if it is not ready yet, and UserError if it is another teacher than the recipe's.
        """


@dataclass(frozen=True)
class _CheckedCall(Generic[C, L]):
    """A call whose answer is refused if no model gives it."""

    call: PoolCall[C, L, torch.Tensor]
    samples: Sequence[Sample]
    checks: AnswerChecks

    @property
    def id(self) -> str:
        return self.call.id

    def validate(self, limits: L) -> None:
        self.call.validate(limits)

    async def attempt(self, client: C, number: int) -> torch.Tensor:
        rows = await self.call.attempt(client, number)
        self.checks.require_credible(rows, self.samples, client.url)
        return rows


class RemoteTeacher(Generic[C, L]):
    """`TeacherModel` on servers: requests run while responses are still generated, and `wait` ends them.

    The requests of a data-parallel copy are distributed over its ranks of the last pipeline stage. Each rank keeps the
    payload that it fetched, in host memory, until the stage's ranks exchange it.
    """

    def __init__(
        self,
        parallel: ParallelState,
        backend: ScoringBackend[C, L],
        config: TeacherConfig,
        *,
        head: torch.Tensor | None = None,
        replicas: TeacherReplicas | None = None,
        failures: Path | None = None,
        stop_signal: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """head: for hidden states, on the last pipeline stage: the teacher's output weight in the student's layout
        [V_padded/tp, h_T]. replicas: on the main rank, if the trainer starts them. failures: folder for the samples
        of answers that are refused. stop_signal: returns the number of the signal that asks the run to stop, or 0."""
        self.parallel, self.head = parallel, head
        self._backend, self._config, self._replicas = backend, config, replicas
        self._stop_signal, self._report = stop_signal, report if parallel.is_main else lambda text: None
        self._checks = AnswerChecks(backend.payload_format, backend.answer_format, backend.terminal, failures)
        self._loop = EventLoopThread("teacher")
        self._pool: ServerPool[C, L] | None = None
        self._max_tokens = 0
        self._run_id = f"{secrets.token_hex(6)}-{parallel.rank}"
        self._submissions = itertools.count()
        self._num_calls = 0  # of this data-parallel copy, over all its ranks
        self._fetches: list[Future[None]] = []
        self._payloads: dict[int, torch.Tensor] = {}  # by Sample.index: fetched and not used yet

    def start(self, max_tokens: int) -> None:
        """As `TeacherModel.start`. Collective. Raises UserError on all ranks."""
        self._max_tokens = max_tokens
        run_on_all_or_raise(self.parallel, lambda: None if self._replicas is None else self._replicas.start(max_tokens))

    def open(self) -> None:
        """As `TeacherModel.open`; returns once a replica is ready. Collective. Raises StopRequested, ServiceUnavailable
        or RuntimeError on all ranks."""
        self._loop.__enter__()
        events = self._wait_for_replicas() if self.parallel.is_main else None
        ((urls, key),) = broadcast_events(self.parallel, events, self._stop_signal)
        opening = None
        if self.parallel.is_last_stage or self.parallel.is_main:  # the main rank reports on the replicas
            opening = self._loop.submit(self._open_pool([self._backend.client(url, key) for url in urls]))
        wait_on_all_ranks(self.parallel, lambda: opening is None or _done([opening]), self._stop_signal)

    def submit(self, samples: Sequence[Sample]) -> None:
        """As `TeacherModel.submit`: the requests run in the background."""
        scorable = [sample for sample in samples if sample.response_ids]
        if not self.parallel.is_last_stage or not scorable:
            return
        assert self._pool is not None, "open comes first"
        for call, group in self._backend.calls(scorable, f"{self._run_id}-{next(self._submissions)}"):
            if self._num_calls % self.parallel.tp_cp_size == self.parallel.tp_cp_rank:
                self._fetches.append(self._loop.submit(self._fetch(self._pool, call, group)))
            self._num_calls += 1

    def wait(self, samples: Sequence[Sample]) -> list[Sample]:
        wait_on_all_ranks(self.parallel, lambda: _done(self._fetches), self._stop_signal)
        self._fetches.clear()
        top_k = self._backend.payload_format
        if not self.parallel.is_last_stage or not isinstance(top_k, TopKPayload):
            self._require_one_row_per_token(samples)
            return list(samples)
        parts = split_top_k(samples, top_k.decode(self._gather_payload(samples)))
        return [replace(sample, teacher_top_k=part) for sample, part in zip(samples, parts, strict=True)]

    def micro_batch_signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """As `TeacherModel.micro_batch_signals`. A micro-batch's hidden states are exchanged, and freed in host memory,
        when the function is called."""
        payload_format = self._backend.payload_format
        if isinstance(payload_format, TopKPayload):
            return lambda index: gather_top_k(batches[index], payload_format)

        def signal_of(index: int) -> TeacherHidden:
            assert self.head is not None
            batch = batches[index]
            hidden = payload_format.decode(batch.gather_local([self._gather_payload(batch.samples)]))
            return TeacherHidden(mask_hidden(hidden, self._backend.terminal.masked_ids), self.head)

        return signal_of

    def target_ids(self, batch: MicroBatch) -> torch.Tensor | None:
        is_top_k = isinstance(self._backend.payload_format, TopKPayload)
        return None if is_top_k else self._backend.terminal.batch_target_ids(batch)

    def close(self) -> None:
        """As `TeacherModel.close`: cancel what is in flight, and stop the replicas that were started here."""
        if self._loop.running:
            self._loop.run(self._cancel_and_close())
            self._loop.__exit__()
        self._fetches.clear()
        self._payloads.clear()
        if self._replicas is not None:
            self._replicas.close()

    def _gather_payload(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the payload [response tokens, bytes_per_token] uint8 of all samples on every rank of the stage, and
        free the fetched parts. Collective over the stage's tensor- and context-parallel ranks."""
        self._require_one_row_per_token(samples)
        lengths = [len(sample.response_ids) for sample in samples]
        width = self._backend.payload_format.bytes_per_token
        payload = torch.zeros(sum(lengths), width, dtype=torch.uint8, device=self.parallel.device)
        for sample, rows in zip(samples, payload.split(lengths), strict=True):
            fetched = self._payloads.pop(sample.index, None)
            if fetched is not None:
                rows.copy_(fetched)
        if self.parallel.tp_cp_size > 1 and len(payload):
            dist.all_reduce(payload, group=self.parallel.tp_cp_group)  # each row is on one rank, 0 on the others
        return payload

    def _require_one_row_per_token(self, samples: Sequence[Sample]) -> None:
        """Raise RuntimeError unless every response token has its row on exactly one rank of the stage."""
        if not self.parallel.is_last_stage or not samples:
            return
        counts = torch.tensor([len(self._payloads.get(s.index, ())) for s in samples], device=self.parallel.device)
        if self.parallel.tp_cp_size > 1:
            dist.all_reduce(counts, group=self.parallel.tp_cp_group)
        for sample, count in zip(samples, counts.tolist(), strict=True):
            require_row_count(sample, count)

    # On the main rank, before there is a pool

    def _wait_for_replicas(self) -> Iterator[tuple[list[str], str | None] | None]:
        """Yield None until the replicas are ready, then their URLs and API key: events for `broadcast_events`."""
        if self._replicas is None:
            urls, file = self._config.urls, self._config.api_key_file
            key = None if file is None else read_api_key(Path(file))
        else:
            urls = yield from self._replicas.wait_urls()
            key = self._replicas.api_key
        clients = [self._backend.client(url, key) for url in urls]
        yield from poll_until_done(self._loop.submit(self._wait_until_ready(clients)))
        yield urls, key

    # In the event loop

    async def _validate(self, client: C) -> L:
        return await self._backend.validate(client, self._max_tokens)

    async def _wait_until_ready(self, clients: Sequence[C]) -> None:
        try:
            await wait_until_any_ready(
                clients,
                self._validate,
                kind=REPLICA_KIND,
                minutes=self._config.startup_timeout_minutes,
                report=self._report,
            )
        finally:
            for client in clients:
                await client.close()

    async def _open_pool(self, clients: Sequence[C]) -> None:
        timeout = 60 * self._config.unavailable_timeout_minutes
        self._pool = ServerPool(
            clients, self._validate, kind=REPLICA_KIND, unavailable_timeout=timeout, report=self._report
        )
        await self._pool.open()

    async def _fetch(
        self, pool: ServerPool[C, L], call: PoolCall[C, L, torch.Tensor], samples: Sequence[Sample]
    ) -> None:
        async for rows in pool.run([_CheckedCall(call, samples, self._checks)]):
            parts = rows.split([len(sample.response_ids) for sample in samples])
            for sample, part in zip(samples, parts, strict=True):
                if sample.index in self._payloads:
                    raise RuntimeError(f"prompt {sample.prompt.id}: it was scored twice")
                self._payloads[sample.index] = part

    async def _cancel_and_close(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pool is not None:
            await self._pool.close()


def _done(work: Sequence[Future[None]]) -> bool:
    """Return whether all work is done, after at most FUTURE_POLL_SECONDS. Raises what a part of it raised."""
    finished, running = wait(work, FUTURE_POLL_SECONDS, FIRST_EXCEPTION)
    for one in finished:
        one.result()
    return not running
