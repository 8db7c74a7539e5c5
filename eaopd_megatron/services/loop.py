"""An event loop for a trainer that knows nothing of event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.2
"""How long a rank waits for what runs in the background before it looks at what else there is."""


class Loop:
    """An event loop in a thread of its own, from entering to leaving it."""

    def __init__(self, name: str = "rollout") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)

    def __enter__(self) -> Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """A coroutine begins to run."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine."""
        return self.begin(work).result()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Soon, without waiting for it; from any thread."""
        self._loop.call_soon_threadsafe(function, *arguments)


def until_done(future: Future[T]) -> Generator[None, None, T]:
    """Yields every POLL_SECONDS while it is not done; its result is the generator's."""
    while not wait([future], POLL_SECONDS).done:
        yield None
    return future.result()
