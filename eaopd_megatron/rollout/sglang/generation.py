"""Responses that servers write while the trainer does something else."""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Sequence

from eaopd_megatron.data.types import Prompt, Sample, Sampling
from eaopd_megatron.rollout.sglang.wire import Completion, Limits, Request, completion
from eaopd_megatron.serving.client import Client
from eaopd_megatron.serving.pool import Pool, Unfit
from eaopd_megatron.serving.readiness import Loop


class Generation:
    """A response as a pool's call. versions: of the weights that may write it, asked when it is there; None: any."""

    def __init__(self, request: Request, versions: Callable[[], Collection[str] | None] = lambda: None) -> None:
        self.request, self._versions = request, versions

    @property
    def id(self) -> str:
        return self.request.id

    def check(self, limits: Limits) -> None:
        """Raises UserError."""
        limits.check(self.request.body())

    async def attempt(self, client: Client, number: int) -> Completion:
        """Raises Unfit for a server that was restarted unseen and has older weights."""
        body = self.request.body(number)
        done = completion(self.request, body["rid"], await client.generate(body), client.url)
        wanted = self._versions()
        if wanted is not None and (old := next((s.version for s in done.versions if s.version not in wanted), None)):
            raise Unfit(f"it has weights of version '{old}'")
        return done


class Writing:
    """Responses that a pool writes in the background, one a prompt; `index` is the prompt's place.

    The servers draw the tokens, from random numbers of their own: other than `rollout.local`'s, samples are not a
    function of the recipe's seed.
    """

    def __init__(
        self,
        loop: Loop,
        pool: Pool[Client, Limits],
        prompts: Sequence[Prompt],
        sampling: Sampling,
        versions: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self.prompts = prompts
        self._done: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        self._ended = False
        requests = [Request(f"{i}-{prompt.id}", prompt.token_ids, sampling) for i, prompt in enumerate(prompts)]
        self._places = {request.id: i for i, request in enumerate(requests)}
        self._work = loop.begin(self._collect(pool, [Generation(request, versions) for request in requests]))

    async def _collect(self, pool: Pool[Client, Limits], calls: Sequence[Generation]) -> None:
        try:
            async for completion in pool.run(calls):
                self._done.put(completion)
        finally:
            self._done.put(None)

    def next(self, seconds: float | None = None) -> Sample | None:
        """The next one that is finished; None after the last one.

        Raises queue.Empty when none was finished in time, and UserError as `Pool.run` does.
        """
        completion = None if self._ended else self._done.get(timeout=seconds)
        if completion is None:
            self._ended = True
            self._work.result()
            return None
        place = self._places[completion.id]
        return completion.sample(self.prompts[place], place)

    @property
    def finished(self) -> bool:
        """Whether all responses are written, or none will be any more."""
        return self._work.done()

    def cancel(self) -> None:
        """Give up what is not finished."""
        self._work.cancel()

    def all(self) -> list[Sample]:
        """One sample a prompt, in order, when all are written."""
        samples = iter(self.next, None)
        return sorted((sample for sample in samples if sample is not None), key=lambda sample: sample.index)
