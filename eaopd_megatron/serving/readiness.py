"""Servers that are waited for before the first work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_fixed

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.client import Busy, ServerGone

T = TypeVar("T")
FUTURE_POLL_SECONDS = 0.2
"""How long a rank waits for what runs in the background before it looks at what else there is."""


class EventLoopThread:
    """An event loop in a thread of its own, from entering to leaving it."""

    def __init__(self, name: str = "rollout") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)

    def __enter__(self) -> EventLoopThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """A coroutine begins to run."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine."""
        return self.submit(work).result()

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Soon, without waiting for it; from any thread."""
        self._loop.call_soon_threadsafe(function, *arguments)


def poll_until_done(future: Future[T]) -> Generator[None, None, T]:
    """Yields every POLL_SECONDS while it is not done; its result is the generator's."""
    while not wait([future], FUTURE_POLL_SECONDS).done:
        yield None
    return future.result()


_REPORT_SECONDS = 15


class _HasUrl(Protocol):
    """A server's client, as far as messages need it."""

    @property
    def url(self) -> str: ...


N = TypeVar("N", bound=_HasUrl)


@dataclass(frozen=True)
class Arrival:
    """How long servers are waited for, and what messages call one."""

    kind: str
    minutes: float
    report: Callable[[str], None]

    async def of(self, client: N, ask: Callable[[N], Awaitable[T]]) -> T:
        """What `ask` finds, once the server answers. Raises ServerGone or Busy where it does not, and UserError."""

        def still(state: RetryCallState) -> None:
            if state.attempt_number % _REPORT_SECONDS == 1 and state.outcome is not None:
                self.report(f"waiting for {self.kind} {client.url}: {state.outcome.exception()}")

        retrying = AsyncRetrying(
            retry=retry_if_exception_type((ServerGone, Busy)),
            stop=stop_after_delay(60 * self.minutes),
            wait=wait_fixed(1.0),
            before_sleep=still,
            reraise=True,
        )
        return await retrying(ask, client)

    async def of_all(self, clients: Sequence[N], ask: Callable[[N], Awaitable[object]]) -> None:
        """Goes on without those that are not there in time. Raises UserError where none is, and what `ask` raises."""
        found = await asyncio.gather(*(self.of(client, ask) for client in clients), return_exceptions=True)
        absent = []
        for client, one in zip(clients, found, strict=True):
            if isinstance(one, ServerGone | Busy):
                absent.append(f"{client.url}: {one}")
            elif isinstance(one, BaseException):
                raise one
        if not absent:
            return
        minutes, which = f"{self.minutes:g} minutes", "; ".join(absent)
        if len(absent) == len(clients):
            raise UserError(
                f"no {self.kind} is there after {minutes} ({which}): start one, or raise its startup_timeout_minutes"
            )
        self.report(f"going on without {self.kind}s that are not there after {minutes}: {which}")
