"""The synchronous side of a pool, in tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.rollout.sglang.requests import BackgroundGeneration, LengthLimits
from eaopd_megatron.serving.http import EventLoopThread, SGLangClient
from eaopd_megatron.serving.pool import ServerPool


@contextmanager
def pooled(
    client: SGLangClient, admit: Callable[[SGLangClient], Awaitable[LengthLimits]]
) -> Iterator[Callable[[Sequence[Prompt], SamplingParams], BackgroundGeneration]]:
    """What begins to write responses with a pool of one server."""
    with EventLoopThread() as loop:
        pool = ServerPool([client], admit, report=lambda _: None)
        loop.run(pool.open())
        try:
            yield partial(BackgroundGeneration, loop, pool)
        finally:
            loop.run(pool.close())


def all_samples(generation: BackgroundGeneration) -> list[Sample]:
    """Wait for all responses; one sample per prompt, in order."""
    samples = iter(generation.next_sample, None)
    return sorted((sample for sample in samples if sample is not None), key=lambda sample: sample.index)
