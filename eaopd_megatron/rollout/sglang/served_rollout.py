"""Rollouts by SGLang servers, as the trainer's ranks see them.

Only the main rank talks to the servers. It broadcasts events (`broadcast_events`) to the other ranks: finished
responses, and that a server is back, for which all ranks export the student's weights.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config.schema import ServersConfig, WeightSyncConfig
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.distributed.broadcast import broadcast_events
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState, num_ranks_on_rank0_host
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.offload import TrainerMemory
from eaopd_megatron.rollout.interface import GenerationRequest, RolloutHandle
from eaopd_megatron.rollout.sglang.colocation import ColocationScheduler
from eaopd_megatron.rollout.sglang.identity import LogprobProbe
from eaopd_megatron.rollout.sglang.requests import BackgroundGeneration
from eaopd_megatron.rollout.sglang.server_manager import ServerManager
from eaopd_megatron.rollout.weight_sync.updater import WeightUpdater
from eaopd_megatron.serving.http import SGLangClient

_POLL_SECONDS = 0.2
_REFRESH = "refresh"  # event: a server is back and needs the student's weights; all other events are responses
_UNVERSIONED = "default"  # SGLang's name for weights of a server that was started without --weight-version
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class ServedRolloutContext:
    """What the trainer provides for rollouts by servers."""

    vocab_size: int  # common to student and teachers; responses end before an id that is not below it
    batch_tokens: int  # that a rank collects at a time, about a micro-batch
    precision: str  # of the student: "bf16" | "fp32"
    logs: Path  # folder of the logs of servers started here
    scratch: Path  # folder of exported weights, visible to the servers
    compute_logprobs: Callable[[Sequence[int]], list[float]]  # nats, of every token after the first; collective
    stop_signal: Callable[[], int]  # number of the signal that asks the run to stop, or 0
    report: Callable[[str], None]
    masked_ids: Collection[int] = ()  # ids before which responses end, too


@dataclass(frozen=True, eq=False)
class _PendingRollout(RolloutHandle):
    """generation: on the main rank."""

    generation: BackgroundGeneration | None = None


class ServedRollout:
    """`RolloutEngine` by servers. `_manager` is None on all ranks but the main one."""

    def __init__(
        self,
        servers: ServersConfig,
        weight_sync: WeightSyncConfig,
        context: ServedRolloutContext,
        parallel: ParallelState,
        model: ModelChunks,
        student: HfFolder,
        memory: TrainerMemory,
    ) -> None:
        """memory: the trainer's, for colocated servers."""
        self._config, self._weight_sync, self._context, self._parallel = servers, weight_sync, context, parallel
        self._manager: ServerManager | None = None
        colocated = servers.placement == "colocated"
        first_gpu = 0 if colocated else num_ranks_on_rank0_host(parallel)
        report = context.report
        if parallel.is_main:
            self._manager = ServerManager(
                servers, student, context.precision, context.logs, first_gpu=first_gpu, report=report
            )
        self._scheduler = ColocationScheduler(parallel, memory, self._manager) if colocated else None
        run = None if self._manager is None else self._manager.loop.run
        self._updater = WeightUpdater(model, student, parallel, weight_sync, context.scratch, run=run, report=report)
        self._probe_ids: Sequence[int] = ()
        self._version: int | None = None  # of the servers' weights
        self._pending: _PendingRollout | None = None  # may be generated while the caller trains

    def open(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Start the servers in the background; `update_weights` waits for them."""
        self._probe_ids = max(prompts, key=lambda prompt: len(prompt.token_ids)).token_ids[:_PROBE_TOKENS]
        if self._scheduler is not None:
            self._scheduler.offload_trainer()
        if self._manager is not None:
            self._manager.start(max_tokens)

    def update_weights(self, version: int) -> None:
        """Send the model's weights to the servers, once what they generate with older ones is finished."""
        if version == self._version and (self._scheduler is None or self._scheduler.servers_hold_memory):
            return
        before, self._version = self._version, version
        self._forget_lost()
        if self._scheduler is not None:
            self._scheduler.offload_trainer()
        verify = self._weight_sync.verify == "probe"
        if verify or (before is None and version == 0):
            self._set_probe(version)
        if before is None:
            deque(self._receive(ServerManager.wait_until_ready), maxlen=0)
        elif self._pending is not None:
            if self._manager is not None:
                self._manager.set_allowed_versions([before, version])  # a server that comes back gets the new ones
            deque(self._receive(partial(_wait_until_generated, self._pending)), maxlen=0)
        # servers started here have the student's original weights as version 0
        if before is not None or version > 0 or not self._config.launched_by_trainer:
            self._update(version)
        if self._manager is not None:
            self._manager.set_allowed_versions([version])
        if verify:
            run_on_all_or_raise(self._parallel, self._manager.probe_weights if self._manager else lambda: None)

    def submit(self, request: GenerationRequest) -> RolloutHandle:
        """Start generating at once."""
        generation = None if self._manager is None else self._manager.submit(request)
        self._pending = _PendingRollout(request, generation)
        return self._pending

    def collect(self, handle: RolloutHandle) -> Iterator[list[Sample]]:
        """Yield this rank's responses, about a micro-batch for every data-parallel rank at a time."""
        assert isinstance(handle, _PendingRollout)
        local, prompts = set(handle.request.local_indices), handle.request.prompts
        missing = set(local)
        batch_tokens = self._context.batch_tokens * self._parallel.dp_size
        for batch in self._receive(partial(_collect_batches, handle, batch_tokens)):
            own = [replace(sample, prompt=prompts[sample.index]) for sample in batch if sample.index in local]
            samples = [sample.truncated_to_vocab(self._context.vocab_size, self._context.masked_ids) for sample in own]
            for sample in samples:
                missing.remove(sample.index)  # KeyError: it came twice
            yield samples
        if missing:
            raise RuntimeError(f"no response to {len(missing)} of {len(local)} prompts of this rank")
        if self._pending is handle:
            self._pending = None

    def finish_generation(self) -> None:
        """Let colocated servers give the trainer its memory back."""
        if self._scheduler is not None:
            self._forget_lost()
            self._scheduler.onload_trainer()

    def close(self) -> None:
        """Stop the servers that were started here."""
        self._updater.close()
        if self._manager is not None:
            self._manager.close()

    def _receive(self, events: Callable[[ServerManager], Iterator[Any]]) -> Iterator[list[Sample]]:
        """Yield the main rank's responses on all ranks; when a server is back, all ranks export the weights for it."""
        local_events = None if self._manager is None else events(self._manager)
        for event in broadcast_events(self._parallel, local_events, self._context.stop_signal):
            if event == _REFRESH:
                clients = self._manager.outdated() if self._manager else []
                self._mark_updated(clients, self._updater.update_from_disk(self._version or 0, clients))
            else:
                yield event

    def _update(self, version: int) -> None:
        if self._scheduler is not None:
            self._scheduler.resume_weights()
        clients = [] if self._manager is None else self._manager.available()
        self._mark_updated(clients, self._updater.update(version, clients))
        if self._scheduler is not None:
            self._scheduler.resume_kv_cache()

    def _forget_lost(self) -> None:
        for client in self._manager.take_lost() if self._manager else ():
            self._updater.forget(client)
            if self._scheduler is not None:
                self._scheduler.forget(client)

    def _mark_updated(self, clients: Sequence[SGLangClient], failed: dict[SGLangClient, str]) -> None:
        if self._manager is not None:
            self._manager.mark_updated(clients, failed)

    def _set_probe(self, version: int) -> None:
        logprobs = self._context.compute_logprobs(self._probe_ids)
        if self._manager is not None:
            versions = {str(version), *((_UNVERSIONED,) if version == 0 else ())}
            probe = LogprobProbe(self._probe_ids, logprobs, versions=versions)
            self._manager.expected = replace(self._manager.expected, probe=probe)


def _collect_batches(handle: _PendingRollout, batch_tokens: int, manager: ServerManager) -> Iterator[Any]:
    """Yield events of the main rank: batches of responses, without their prompts, which all ranks have."""
    assert handle.generation is not None
    batch: list[Sample] = []
    tokens = 0
    while True:
        yield _refresh_event(manager)
        try:
            sample = handle.generation.next_sample(_POLL_SECONDS)
        except queue.Empty:
            continue
        if sample is not None:
            tokens += len(sample.token_ids)
            batch.append(replace(sample, prompt=None))  # type: ignore[arg-type]
        if batch and (sample is None or tokens >= batch_tokens):
            yield batch
            batch, tokens = [], 0
        if sample is None:
            return


def _wait_until_generated(handle: _PendingRollout, manager: ServerManager) -> Iterator[Any]:
    """Yield events of the main rank until all responses are generated, or no more will be."""
    assert handle.generation is not None
    while not handle.generation.finished:
        yield _refresh_event(manager)
        time.sleep(_POLL_SECONDS)


def _refresh_event(manager: ServerManager) -> str | None:
    return _REFRESH if manager.outdated() else None
