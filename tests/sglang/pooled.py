"""The synchronous side of a pool, in tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from eaopd_megatron.data.types import Prompt, Sampling
from eaopd_megatron.rollout.sglang.generation import Writing
from eaopd_megatron.rollout.sglang.wire import Limits
from eaopd_megatron.serving.client import Client
from eaopd_megatron.serving.pool import Pool
from eaopd_megatron.serving.readiness import Loop


@contextmanager
def pooled(
    client: Client, admit: Callable[[Client], Awaitable[Limits]]
) -> Iterator[Callable[[Sequence[Prompt], Sampling], Writing]]:
    """What begins to write responses with a pool of one server."""
    with Loop() as loop:
        pool = Pool([client], admit, report=lambda _: None)
        loop.run(pool.open())
        try:
            yield partial(Writing, loop, pool)
        finally:
            loop.run(pool.close())
