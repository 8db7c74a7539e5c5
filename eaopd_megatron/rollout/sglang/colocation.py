"""Servers on the trainer's own GPUs: they and the trainer have the memory in turns.

The order of an iteration; what is not the servers' happens on every rank of the trainer:

    TrainerMemory.release, a barrier       optimiser states and gradients leave the GPUs
    Colocated.before_weights               the servers have room for weights, which hold nothing yet
    WeightSync.push                        by `tensor`
    Colocated.before_generation            ... and for the cache
    generation
    Colocated.after_generation, a barrier  cache and weights leave
    TrainerMemory.onload

A server dies if it is to resume what it has, or to release while it generates: `Colocated` knows what each has, and
waits for the last request. Without CUDA a server says yes and keeps its memory, and would hide a wrong order; with CUDA
this has not been run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal

from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.offload import TrainerMemory
from eaopd_megatron.rollout.sglang.server_manager import ServerManager
from eaopd_megatron.serving.client import Busy, ServerGone, SGLangClient

MemoryTag = Literal["weights", "kv_cache"]
_IDLE_SECONDS = 30.0
"""What a request has to end that nobody waits for any more."""


async def release_memory_occupation(
    client: SGLangClient, tags: Sequence[MemoryTag], *, idle: float = _IDLE_SECONDS
) -> None:
    """The server gives that memory back, once no request runs; its cache of prompts is empty then.

    Raises ServerGone, Busy, and UserError where a request still runs after `idle` seconds.
    """
    await client.request("POST", f"/flush_cache?timeout={idle:g}", seconds=client.timeouts.control + idle)
    await client.request("POST", "/release_memory_occupation", {"tags": list(tags)})


async def resume_memory_occupation(client: SGLangClient, tags: Sequence[MemoryTag]) -> None:
    """The server takes that memory again, whose contents are lost. Raises ServerGone, Busy."""
    await client.request("POST", "/resume_memory_occupation", {"tags": list(tags)})


class ColocatedServers:
    """What memory each of the main rank's servers has, and the changes between phases.

    A server that has just started has all. Every call returns {client: one-line reason} for those that are gone.
    """

    def __init__(self) -> None:
        self._away: dict[SGLangClient, set[MemoryTag]] = {}

    async def resume_weights(self, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """The trainer has released its memory: room for the weights, which are to be pushed."""
        return await self._each(clients, lambda client: self._resume(client, "weights"))

    async def resume_kv_cache(self, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """The weights are pushed: room for the cache. ValueError where `before_weights` was not called."""
        for client in clients:
            if "weights" in self._away.get(client, ()):
                raise ValueError(f"{client.url} has no weights: before_weights and a push come first")
        return await self._each(clients, lambda client: self._resume(client, "kv_cache"))

    async def release_memory(self, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Everything is written, or the servers have just started: their memory is the trainer's."""
        return await self._each(clients, self._release)

    def forget(self, client: SGLangClient) -> None:
        """It died. Started again, it has all of its memory."""
        self._away.pop(client, None)

    async def _resume(self, client: SGLangClient, tag: MemoryTag) -> None:
        away = self._away.get(client, set())
        if tag in away:
            await resume_memory_occupation(client, [tag])
            away.remove(tag)

    async def _release(self, client: SGLangClient) -> None:
        away = self._away.setdefault(client, set())
        tags: list[MemoryTag] = [tag for tag in ("kv_cache", "weights") if tag not in away]
        if tags:
            await release_memory_occupation(client, tags)
            away.update(tags)

    async def _each(
        self, clients: Sequence[SGLangClient], work: Callable[[SGLangClient], Awaitable[None]]
    ) -> dict[SGLangClient, str]:
        lost: dict[SGLangClient, str] = {}

        async def one(client: SGLangClient) -> None:
            try:
                await work(client)
            except (ServerGone, Busy) as error:
                self.forget(client)
                lost[client] = str(error)

        await asyncio.gather(*map(one, clients))
        return lost


class ColocationScheduler:
    """The order is that of `memory`. Collective over all ranks; keeper: on the main rank."""

    def __init__(self, parallel: ParallelState, trainer: TrainerMemory, keeper: ServerManager | None) -> None:
        self._parallel, self._trainer, self._keeper = parallel, trainer, keeper
        self._servers = ColocatedServers()
        self.servers_hold_memory = False

    def offload_trainer(self) -> None:
        """The trainer's memory is free for servers: those that start take what they need."""
        if not self.servers_hold_memory:
            self._trainer.offload()
            run_on_all_or_raise(self._parallel, self._wake)
            self.servers_hold_memory = True

    def resume_weights(self) -> None:
        """Servers have room for weights, which are to be pushed next."""
        run_on_all_or_raise(self._parallel, lambda: self._each(self._servers.resume_weights))

    def resume_kv_cache(self) -> None:
        """... and for the cache, with which they generate."""
        run_on_all_or_raise(self._parallel, lambda: self._each(self._servers.resume_kv_cache))

    def onload_trainer(self) -> None:
        """It is the trainer's turn."""
        if self.servers_hold_memory:
            run_on_all_or_raise(self._parallel, self._rest)
            self._trainer.onload()
            self.servers_hold_memory = False

    def forget(self, client: SGLangClient) -> None:
        """It died."""
        self._servers.forget(client)

    def _wake(self) -> None:
        if self._keeper is not None:
            self._keeper.restart_stopped()

    def _rest(self) -> None:
        if self._keeper is not None:
            self._keeper.stop_unreachable()
            self._each(self._servers.release_memory)

    def _each(self, work: Callable[[Sequence[SGLangClient]], Coroutine[Any, Any, dict[SGLangClient, str]]]) -> None:
        clients = [] if self._keeper is None else self._keeper.available()
        if self._keeper is not None and clients:  # none: also where they were ended, and the loop with them
            self._keeper.mark_updated((), self._keeper.loop.run(work(clients)))
