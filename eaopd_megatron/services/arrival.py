"""Servers that are waited for before the first work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_fixed

from eaopd_megatron.errors import UserError
from eaopd_megatron.services.client import Busy, ServerGone

REPORT_SECONDS = 15


class Named(Protocol):
    """A server's client, as far as messages need it."""

    @property
    def url(self) -> str: ...


N = TypeVar("N", bound=Named)
T = TypeVar("T")


@dataclass(frozen=True)
class Arrival:
    """How long servers are waited for, and what messages call one."""

    kind: str
    minutes: float
    report: Callable[[str], None]

    async def of(self, client: N, ask: Callable[[N], Awaitable[T]]) -> T:
        """What `ask` finds, once the server answers. Raises ServerGone or Busy where it does not, and UserError."""

        def still(state: RetryCallState) -> None:
            if state.attempt_number % REPORT_SECONDS == 1 and state.outcome is not None:
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
            raise UserError(f"no {self.kind} is there after {minutes} ({which}): start one, or raise its start_minutes")
        self.report(f"going on without {self.kind}s that are not there after {minutes}: {which}")
