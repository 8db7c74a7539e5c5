"""Responses that servers write while the trainer does something else."""

from __future__ import annotations

import queue
from collections.abc import Callable, Collection, Sequence

from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.rollout.sglang.wire import GenerateRequest, GenerationOutput, LengthLimits, parse_output
from eaopd_megatron.serving.client import SGLangClient
from eaopd_megatron.serving.pool import ServerPool, StaleServer
from eaopd_megatron.serving.readiness import EventLoopThread


class GenerateCall:
    """A response as a pool's call. versions: of the weights that may write it, asked when it is there; None: any."""

    def __init__(self, request: GenerateRequest, versions: Callable[[], Collection[str] | None] = lambda: None) -> None:
        self.request, self._versions = request, versions

    @property
    def id(self) -> str:
        return self.request.id

    def validate(self, limits: LengthLimits) -> None:
        """Raises UserError."""
        limits.validate(self.request.body())

    async def attempt(self, client: SGLangClient, number: int) -> GenerationOutput:
        """Raises Unfit for a server that was restarted unseen and has older weights."""
        body = self.request.body(number)
        done = parse_output(self.request, body["rid"], await client.generate(body), client.url)
        wanted = self._versions()
        if wanted is not None and (
            old := next((s.version for s in done.weight_spans if s.version not in wanted), None)
        ):
            raise StaleServer(f"it has weights of version '{old}'")
        return done


class BackgroundGeneration:
    """Responses that a pool writes in the background, one a prompt; `index` is the prompt's place.

    The servers draw the tokens, from random numbers of their own: other than `rollout.local`'s, samples are not a
    function of the recipe's seed.
    """

    def __init__(
        self,
        loop: EventLoopThread,
        pool: ServerPool[SGLangClient, LengthLimits],
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        versions: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self.prompts = prompts
        self._done: queue.SimpleQueue[GenerationOutput | None] = queue.SimpleQueue()
        self._ended = False
        requests = [GenerateRequest(f"{i}-{prompt.id}", prompt.token_ids, sampling) for i, prompt in enumerate(prompts)]
        self._places = {request.id: i for i, request in enumerate(requests)}
        self._work = loop.submit(self._collect(pool, [GenerateCall(request, versions) for request in requests]))

    async def _collect(self, pool: ServerPool[SGLangClient, LengthLimits], calls: Sequence[GenerateCall]) -> None:
        try:
            async for completion in pool.run(calls):
                self._done.put(completion)
        finally:
            self._done.put(None)

    def next_sample(self, seconds: float | None = None) -> Sample | None:
        """The next one that is finished; None after the last one.

        Raises queue.Empty when none was finished in time, and UserError as `Pool.run` does.
        """
        completion = None if self._ended else self._done.get(timeout=seconds)
        if completion is None:
            self._ended = True
            self._work.result()
            return None
        place = self._places[completion.id]
        return completion.to_sample(self.prompts[place], place)

    @property
    def finished(self) -> bool:
        """Whether all responses are written, or none will be any more."""
        return self._work.done()

    def cancel(self) -> None:
        """Give up what is not finished."""
        self._work.cancel()

    def all_samples(self) -> list[Sample]:
        """One sample a prompt, in order, when all are written."""
        samples = iter(self.next_sample, None)
        return sorted((sample for sample in samples if sample is not None), key=lambda sample: sample.index)
