"""Servers on the trainer's own GPUs, which take turns with the trainer in using the memory.

The order of an iteration; what is not the servers' happens on every rank of the trainer:

    TrainerMemory.offload, a barrier            optimizer states and gradients leave the GPUs
    ColocatedServers.resume_weights             the servers allocate their weights, without contents
    WeightUpdater.update                        by transport `tensor`
    ColocatedServers.resume_kv_cache
    generation
    ColocatedServers.release_memory, a barrier  KV cache and weights leave
    TrainerMemory.onload

A server dies when it is told to resume memory that it has, or to release memory while it generates: `ColocatedServers`
tracks what each has, and waits for the last request. Without CUDA a server accepts these requests and keeps its memory,
which would hide a wrong order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal

from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.offload import TrainerMemory
from eaopd_megatron.rollout.sglang.server_manager import ServerManager
from eaopd_megatron.serving.http import Busy, ServerGone, SGLangClient

MemoryTag = Literal["weights", "kv_cache"]
_TAGS: tuple[MemoryTag, ...] = ("kv_cache", "weights")
_IDLE_SECONDS = 30.0  # for requests that nobody waits for any more to end


async def release_memory_occupation(
    client: SGLangClient, tags: Sequence[MemoryTag], *, idle: float = _IDLE_SECONDS
) -> None:
    """Make the server free this memory, and empty its prefix cache, once no request runs.

    Raises ServerGone, Busy, and UserError if a request still runs after `idle` seconds.
    """
    await client.request("POST", f"/flush_cache?timeout={idle:g}", seconds=client.timeouts.control + idle)
    await client.request("POST", "/release_memory_occupation", {"tags": list(tags)})


class ColocatedServers:
    """The memory that each server has released: none when it has just started. All methods return {client: reason in
    one line} for the servers that are gone."""

    def __init__(self) -> None:
        self._released: dict[SGLangClient, set[MemoryTag]] = {}

    async def resume_weights(self, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Allocate the weights, for an update to fill. The trainer has offloaded its memory."""
        return await self._each(clients, lambda client: self._resume(client, "weights"))

    async def resume_kv_cache(self, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Allocate the KV cache, after the update. Raises ValueError if `resume_weights` was not called."""
        for client in clients:
            if "weights" in self._released.get(client, ()):
                raise ValueError(f"{client.url} has no weights: resume_weights and an update come first")
        return await self._each(clients, lambda client: self._resume(client, "kv_cache"))

    async def release_memory(self, clients: Sequence[SGLangClient]) -> dict[SGLangClient, str]:
        """Free all memory for the trainer, after generation or right after the servers started."""
        return await self._each(clients, self._release)

    def forget(self, client: SGLangClient) -> None:
        """The server died: when it is back, it has all of its memory."""
        self._released.pop(client, None)

    async def _resume(self, client: SGLangClient, tag: MemoryTag) -> None:
        released = self._released.get(client, set())
        if tag in released:
            await client.request("POST", "/resume_memory_occupation", {"tags": [tag]})  # its contents are lost
            released.remove(tag)

    async def _release(self, client: SGLangClient) -> None:
        released = self._released.setdefault(client, set())
        if tags := [tag for tag in _TAGS if tag not in released]:
            await release_memory_occupation(client, tags)
            released.update(tags)

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
    """Moves the GPU memory between the trainer and its servers. Collective over all ranks, except `forget`."""

    def __init__(self, parallel: ParallelState, trainer: TrainerMemory, manager: ServerManager | None) -> None:
        """manager: on the main rank."""
        self._parallel, self._trainer, self._manager = parallel, trainer, manager
        self._servers = ColocatedServers()
        self.servers_hold_memory = False

    def offload_trainer(self) -> None:
        """Offload the trainer's memory; servers that start from now on allocate all of theirs."""
        if not self.servers_hold_memory:
            self._trainer.offload()
            run_on_all_or_raise(self._parallel, self._manager.restart_stopped if self._manager else lambda: None)
            self.servers_hold_memory = True

    def resume_weights(self) -> None:
        """Let the servers allocate their weights. An update comes next."""
        run_on_all_or_raise(self._parallel, lambda: self._each(self._servers.resume_weights))

    def resume_kv_cache(self) -> None:
        run_on_all_or_raise(self._parallel, lambda: self._each(self._servers.resume_kv_cache))

    def onload_trainer(self) -> None:
        """Let the servers release all memory, and bring the trainer's back."""
        if self.servers_hold_memory:
            run_on_all_or_raise(self._parallel, self._release_servers)
            self._trainer.onload()
            self.servers_hold_memory = False

    def forget(self, client: SGLangClient) -> None:
        """As `ColocatedServers.forget`."""
        self._servers.forget(client)

    def _release_servers(self) -> None:
        if self._manager is not None:
            self._manager.stop_unreachable()
            self._each(self._servers.release_memory)

    def _each(self, work: Callable[[Sequence[SGLangClient]], Coroutine[Any, Any, dict[SGLangClient, str]]]) -> None:
        clients = [] if self._manager is None else self._manager.available()
        if self._manager is not None and clients:  # none also when the servers and their loop were stopped
            self._manager.mark_updated((), self._manager.loop.run(work(clients)))
