"""Responses that servers write while the trainer does something else."""

from __future__ import annotations

import queue
from collections.abc import Sequence

from eaopd_megatron.data.samples import Prompt, Sample, Sampling
from eaopd_megatron.rollout.sglang.loop import Loop
from eaopd_megatron.rollout.sglang.pool import Pool
from eaopd_megatron.rollout.sglang.wire import Completion, Request


class Writing:
    """Responses that a pool writes in the background, one a prompt; `index` is the prompt's place.

    The servers draw the tokens, from random numbers of their own: other than `rollout.local`'s, samples are not a
    function of the recipe's seed.
    """

    def __init__(self, loop: Loop, pool: Pool, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.prompts = prompts
        self._done: queue.SimpleQueue[Completion | None] = queue.SimpleQueue()
        self._ended = False
        requests = [Request(f"{i}-{prompt.id}", prompt.token_ids, sampling) for i, prompt in enumerate(prompts)]
        self._places = {request.id: i for i, request in enumerate(requests)}
        self._work = loop.begin(self._collect(pool, requests))

    async def _collect(self, pool: Pool, requests: Sequence[Request]) -> None:
        try:
            async for completion in pool.generate(requests):
                self._done.put(completion)
        finally:
            self._done.put(None)

    def next(self, seconds: float | None = None) -> Sample | None:
        """The next one that is finished; None after the last one.

        Raises queue.Empty when none was finished in time, and UserError as `Pool.generate` does.
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
