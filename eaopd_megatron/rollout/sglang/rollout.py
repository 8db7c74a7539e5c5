"""Rollouts by a pool of servers, for a trainer that knows nothing of event loops."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from eaopd_megatron.data.samples import Prompt, Sample, Sampling
from eaopd_megatron.rollout.sglang.client import Client
from eaopd_megatron.rollout.sglang.pool import Pool
from eaopd_megatron.rollout.sglang.wire import Completion, Limits, Request

T = TypeVar("T")


class SglangRollout:
    """Runs a pool in an event loop of its own thread. A context manager; use it on one rank, which shares the samples.

    The servers draw the tokens, from random numbers of their own: other than `rollout.local`'s, samples are not a
    function of the recipe's seed.
    """

    def __init__(
        self, clients: Callable[[], Sequence[Client]], admit: Callable[[Client], Awaitable[Limits]], **settings: Any
    ) -> None:
        """clients: makes them, in the loop's thread. admit, settings: as `Pool` takes them."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._clients, self._admit, self._settings = clients, admit, settings
        self.pool: Pool

    def __enter__(self) -> SglangRollout:
        async def open_pool() -> None:
            self.pool = Pool(self._clients(), self._admit, **self._settings)
            await self.pool.open()

        self._thread.start()
        try:
            self.run(open_pool())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "pool"):
            self.run(self.pool.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that uses the pool or its clients."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def lost(self, client: Client, reason: str) -> None:
        """`Pool.lost`, from any thread."""
        self._loop.call_soon_threadsafe(self.pool.lost, client, reason)

    def stream(self, prompts: Sequence[Prompt], sampling: Sampling) -> Generator[Sample]:
        """One sample a prompt, each as soon as it is finished; `index` is the prompt's place in `prompts`.

        Raises UserError as `Pool.generate` does. Leaving the iteration gives up what is not finished.
        """
        requests = [Request(f"{i}-{prompt.id}", prompt.token_ids, sampling) for i, prompt in enumerate(prompts)]
        places = {request.id: i for i, request in enumerate(requests)}
        done: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()

        async def collect() -> None:
            try:
                async for completion in self.pool.generate(requests):
                    done.put(completion)
            finally:
                done.put(None)

        work: Future[None] = asyncio.run_coroutine_threadsafe(collect(), self._loop)
        try:
            while (completion := done.get()) is not None:
                place = places[completion.id]
                yield completion.sample(prompts[place], place)
            work.result()
        finally:
            work.cancel()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """One sample a prompt, in order."""
        return sorted(self.stream(prompts, sampling), key=lambda sample: sample.index)
