"""The synchronous side of a pool, in tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from eaopd_megatron.data.types import Prompt, SamplingParams
from eaopd_megatron.rollout.sglang.generation import BackgroundGeneration
from eaopd_megatron.rollout.sglang.wire import LengthLimits
from eaopd_megatron.serving.client import SGLangClient
from eaopd_megatron.serving.pool import ServerPool
from eaopd_megatron.serving.readiness import EventLoopThread


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
