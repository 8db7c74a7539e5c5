"""The synchronous side of a pool, in tests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from eaopd_megatron.data.samples import Prompt, Sampling
from eaopd_megatron.rollout.sglang.wire import Limits
from eaopd_megatron.rollout.sglang.writing import Writing
from eaopd_megatron.services.client import Client
from eaopd_megatron.services.loop import Loop
from eaopd_megatron.services.pool import Pool


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
