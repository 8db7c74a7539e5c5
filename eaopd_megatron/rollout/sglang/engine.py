"""Rollouts by SGLang servers, as the trainer's ranks see them.

Only the main rank talks to the servers. It broadcasts what it sees (`broadcast_events`): finished responses, and that a
server is back, for which all ranks export the student's weights.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.distributed.broadcast import broadcast_events
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState, num_ranks_on_rank0_host
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.offload import TrainerMemory
from eaopd_megatron.rollout.interface import GenerationRequest, RolloutHandle
from eaopd_megatron.rollout.sglang.colocation import ColocationScheduler
from eaopd_megatron.rollout.sglang.generation import BackgroundGeneration
from eaopd_megatron.rollout.sglang.identity import LogprobProbe
from eaopd_megatron.rollout.sglang.server_manager import ServerManager
from eaopd_megatron.rollout.weight_sync.updater import WeightUpdater
from eaopd_megatron.serving.client import SGLangClient

_POLL_SECONDS = 0.2
_REFRESH = "refresh"
"""News that a server is back and waits for the student's weights; any other news are responses."""
NOBODY_SENT = "default"
"""SGLang's name for weights that were never updated, where it is given none."""
_PROBE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class _PendingRollout(RolloutHandle):
    """writing: on the main rank."""

    generation: BackgroundGeneration | None = None


class ServedRollout:
    """`interface.Rollout` by servers. `_keeper` is None on all ranks but the main one."""

    def __init__(
        self,
        recipe: Recipe,
        parallel: ParallelState,
        model: ModelChunks,
        student: HfFolder,
        *,
        vocab_size: int,
        logs: Path,
        scratch: Path,
        logprobs: Callable[[Sequence[int]], list[float]],
        memory: TrainerMemory,
        asked: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """vocab_size: of student and teachers; responses end before an id that is not below it. logs: folder of the
        logs of servers started here. scratch: folder of exported weights, which the servers see too. logprobs: what
        gives the student's log-probs (nats) of a sequence's tokens but the first; collective. memory: the trainer's,
        for colocated servers. asked: the number of a signal that asks the run to stop, or 0."""
        self.recipe, self.parallel, self._logprobs, self._asked = recipe, parallel, logprobs, asked
        self._vocab_size = vocab_size
        self._keeper: ServerManager | None = None
        colocated = recipe.servers.placement == "colocated"
        first_gpu = 0 if colocated else num_ranks_on_rank0_host(parallel)
        if parallel.is_main:
            self._keeper = ServerManager(recipe, student, logs, first_gpu=first_gpu, report=report)
        self._turns = ColocationScheduler(parallel, memory, self._keeper) if colocated else None
        self._sync = WeightUpdater(
            model,
            student,
            parallel,
            recipe.weight_sync,
            scratch,
            run=None if self._keeper is None else self._keeper.loop.run,
            report=report,
        )
        # enough for a micro-batch of the teacher's on every data-parallel rank
        self._part_tokens = recipe.train.micro_batch_tokens * parallel.dp_size
        self._probe_ids: Sequence[int] = ()
        self._version: int | None = None  # of the weights that the servers have
        self._ahead: _PendingRollout | None = None  # may be written while the caller trains

    def open(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """The servers begin to start; `publish` waits for them."""
        self._probe_ids = max(prompts, key=lambda prompt: len(prompt.token_ids)).token_ids[:_PROBE_TOKENS]
        if self._turns is not None:
            self._turns.offload_trainer()
        if self._keeper is not None:
            self._keeper.start(max_tokens)

    def update_weights(self, version: int) -> None:
        """The servers get the model's weights, once what they write with older ones is finished."""
        if version == self._version and (self._turns is None or self._turns.servers_hold_memory):
            return
        before, self._version = self._version, version
        self._forget_lost()
        if self._turns is not None:
            self._turns.offload_trainer()
        verify = self.recipe.weight_sync.verify == "probe"
        if verify or (before is None and version == 0):
            self._take_probe(version)
        if before is None:
            self._wait(ServerManager.wait_until_ready)
        elif self._ahead is not None:
            if self._keeper is not None:
                self._keeper.set_allowed_versions([before, version])  # one that comes back gets the new ones
            self._wait(partial(_until_written, self._ahead))
        # servers that were started here have the student's original weights as version 0
        if before is not None or version > 0 or not self.recipe.servers.launched_by_trainer:
            self._push(version)
        if self._keeper is not None:
            self._keeper.set_allowed_versions([version])
        if verify:
            run_on_all_or_raise(self.parallel, self._compare)

    def submit(self, request: GenerationRequest) -> RolloutHandle:
        """The servers begin to write at once."""
        writing = None if self._keeper is None else self._keeper.submit(request)
        self._ahead = _PendingRollout(request, writing)
        return self._ahead

    def collect(self, handle: RolloutHandle) -> Iterator[list[Sample]]:
        """Each part has about a micro-batch for every data-parallel rank."""
        assert isinstance(handle, _PendingRollout)
        mine, prompts = set(handle.request.local_indices), handle.request.prompts
        missing = set(mine)
        for part in self._hear(partial(_written, handle, self._part_tokens)):
            own = [replace(sample, prompt=prompts[sample.index]) for sample in part if sample.index in mine]
            samples = [sample.truncated_to_vocab(self._vocab_size) for sample in own]
            for sample in samples:
                missing.remove(sample.index)  # KeyError: it came twice
            yield samples
        if missing:
            raise RuntimeError(f"no response to {len(missing)} of {len(mine)} prompts of this rank")
        if self._ahead is handle:
            self._ahead = None

    def finish_generation(self) -> None:
        """Colocated servers give the trainer its memory back."""
        if self._turns is not None:
            self._forget_lost()
            self._turns.onload_trainer()

    def close(self) -> None:
        """Ends the servers that were started here."""
        self._sync.close()
        if self._keeper is not None:
            self._keeper.close()

    def _hear(self, news: Callable[[ServerManager], Iterator[Any]]) -> Iterator[list[Sample]]:
        """Responses, on all ranks; for a server that came back all ranks export the weights on the way."""
        told = None if self._keeper is None else news(self._keeper)
        for one in broadcast_events(self.parallel, told, self._asked):
            if one == _REFRESH:
                clients = self._keeper.outdated() if self._keeper else []
                self._given(clients, self._sync.update_from_disk(self._version or 0, clients))
            else:
                yield one

    def _wait(self, news: Callable[[ServerManager], Iterator[Any]]) -> None:
        for _ in self._hear(news):
            pass

    def _compare(self) -> None:
        if self._keeper is not None:
            self._keeper.probe_weights()

    def _push(self, version: int) -> None:
        if self._turns is not None:
            self._turns.resume_weights()
        clients = [] if self._keeper is None else self._keeper.available()
        self._given(clients, self._sync.update(version, clients))
        if self._turns is not None:
            self._turns.resume_kv_cache()

    def _forget_lost(self) -> None:
        for client in self._keeper.take_lost() if self._keeper else ():
            self._sync.forget(client)
            if self._turns is not None:
                self._turns.forget(client)

    def _given(self, clients: Sequence[SGLangClient], failed: dict[SGLangClient, str]) -> None:
        if self._keeper is not None:
            self._keeper.mark_updated(clients, failed)

    def _take_probe(self, version: int) -> None:
        logprobs = self._logprobs(self._probe_ids)
        if self._keeper is not None:
            versions = {str(version), *((NOBODY_SENT,) if version == 0 else ())}
            probe = LogprobProbe(self._probe_ids, logprobs, versions=versions)
            self._keeper.expected = replace(self._keeper.expected, probe=probe)


def _written(ticket: _PendingRollout, part_tokens: int, keeper: ServerManager) -> Iterator[Any]:
    """News on the main rank: responses in parts, without their prompts, which all ranks have."""
    assert ticket.generation is not None
    part: list[Sample] = []
    tokens = 0
    while True:
        yield _comeback(keeper)
        try:
            sample = ticket.generation.next_sample(_POLL_SECONDS)
        except queue.Empty:
            continue
        if sample is not None:
            tokens += len(sample.token_ids)
            part.append(replace(sample, prompt=None))  # type: ignore[arg-type]
        if part and (sample is None or tokens >= part_tokens):
            yield part
            part, tokens = [], 0
        if sample is None:
            return


def _until_written(ticket: _PendingRollout, keeper: ServerManager) -> Iterator[Any]:
    """News on the main rank until no response is missing, or none will come any more."""
    assert ticket.generation is not None
    while not ticket.generation.finished:
        yield _comeback(keeper)
        time.sleep(_POLL_SECONDS)


def _comeback(keeper: ServerManager) -> str | None:
    return _REFRESH if keeper.outdated() else None
