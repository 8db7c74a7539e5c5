"""A pool of servers: each call runs on the least loaded server, and on another one when that dies.

A call has one attempt at a time and one answer. A server that dropped a connection and does not answer, or that was
reported dead by whoever watches its process, gets no more calls; its unfinished ones go to the others. The pool polls
it until `admit` lets it in again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

from tenacity import AsyncRetrying, retry_if_result, wait_random_exponential

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import Busy, HttpClient, ServerGone
from eaopd_megatron.utils.log import log_rank0

_MAX_ATTEMPTS = 8  # after this many servers that died under a call or gave it up, the call is the likelier cause


class PoolLimits(Protocol):
    def intersect(self, other: Self) -> Self:
        """Return what two servers both accept."""


C = TypeVar("C", bound=HttpClient)
L = TypeVar("L", bound=PoolLimits)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
C_contra = TypeVar("C_contra", bound=HttpClient, contravariant=True)
L_contra = TypeVar("L_contra", bound=PoolLimits, contravariant=True)


class StaleServer(Exception):
    """The server has other weights than when it was admitted; it must be admitted again."""


class NotYet(Busy):
    """The server can be admitted once the pool's user has acted (e.g. sent weights). Not downtime."""


class PoolCall(Protocol[C_contra, L_contra, T_co]):
    """A request that any of the servers can answer."""

    @property
    def id(self) -> str:
        """Unique among the calls of one `ServerPool.run`."""

    def validate(self, limits: L_contra) -> None:
        """Raise UserError for a call that a server with these limits cannot take."""

    async def attempt(self, client: C_contra, number: int) -> T_co:
        """Return the answer. Raises ServerGone, Busy (try again), StaleServer, UserError."""


@dataclass(eq=False)
class _Member(Generic[C]):
    client: C
    alive: bool = False
    not_yet: bool = False  # not alive, and `NotYet` was the reason
    reason: str = "not asked yet"  # for not being alive
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set when it dies
    readmission: asyncio.Task[bool] | None = None  # running after a dropped connection
    running: int = 0  # number of calls
    calls: set[asyncio.Task[Any]] = field(default_factory=set)


class ServerPool(Generic[C, L]):
    """Runs calls on servers, all in one event loop. `open` comes first and `close` last.

    admit: called for each server before it gets calls, at first and whenever it is back. It returns the server's
    limits, or raises ServerGone or Busy (not ready), `NotYet` (not ready; waiting does not count as downtime), or
    UserError (the pool fails).
    """

    def __init__(
        self,
        clients: Sequence[C],
        admit: Callable[[C], Awaitable[L]],
        *,
        kind: str = "rollout server",
        unavailable_timeout: float = 600.0,
        heartbeat_interval: float = 10.0,
        readmission_wait: float = 0.2,
        report: Callable[[str], None] = log_rank0,
    ) -> None:
        """kind: name of a server in messages. unavailable_timeout: seconds that calls wait without any server before
        the pool gives up. heartbeat_interval: seconds between health checks. readmission_wait: seconds before a lost
        server is tried again; grows up to 5 s."""
        self._members = [_Member(client) for client in clients]
        self._admit, self._kind, self._report = admit, kind, report
        self._unavailable_timeout, self._readmission_wait = unavailable_timeout, readmission_wait
        self._heartbeat_interval = heartbeat_interval
        self._waiting: deque[asyncio.Future[_Member[C]]] = deque()  # calls that wait for a server
        self._monitors: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Task[Any]] = set()  # calls that are not complete
        self._num_waiting = 0
        self._timer: asyncio.TimerHandle | None = None  # runs while calls wait and no server is alive
        self._failure: Exception | None = None
        self._timeout_failure: Exception | None = None  # the failure, if it is that no server was alive
        self._limits: L | None = None
        self._lost: set[C] = set()

    async def open(self) -> None:
        """Admit the servers that are ready; keep trying the others in the background. Raises UserError."""
        await asyncio.gather(*(self._try_to_admit(member) for member in self._members))
        self._report_if_all_down()
        self._monitors = [asyncio.create_task(self._monitor(member)) for member in self._members]

    async def run(self, calls: Sequence[PoolCall[C, L, T]]) -> AsyncGenerator[T]:
        """Yield one answer per call, in the order in which they finish. Close the iterator to cancel the others.

        All calls are validated before the first attempt. Raises UserError for an invalid call or answer, and when calls
        have waited for `unavailable_timeout` without a server.
        """
        if len({call.id for call in calls}) != len(calls):
            raise ValueError("two calls have the same id")
        if self._limits is None:  # no server was admitted yet
            self._release(await self._acquire())
        assert self._limits is not None
        for call in calls:
            call.validate(self._limits)
        tasks = [asyncio.create_task(self._complete(call)) for call in calls]
        self._running.update(tasks)
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._running.difference_update(tasks)

    def available(self) -> list[C]:
        """Return the servers that get calls."""
        return [member.client for member in self._members if member.alive]

    def take_lost(self) -> set[C]:
        """Return the servers that were lost since the previous call. Thread-safe."""
        taken, self._lost = self._lost, set()
        return taken

    def mark_lost(self, client: C, reason: str) -> None:
        """Take a server out of the pool until it is admitted again."""
        for member in self._members:
            if member.client is client:
                self._lose(member, reason)

    async def close(self) -> None:
        """Cancel what still runs: a call whose connection is closed under it would open another one."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._monitors, *self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self._members:
            await member.client.close()

    async def _complete(self, call: PoolCall[C, L, T]) -> T:
        reasons: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            member = await self._acquire()
            task = asyncio.ensure_future(call.attempt(member.client, attempt))
            member.calls.add(task)
            try:
                return await task
            except StaleServer as stale:
                reasons.append(str(stale))
                self._lose(member, reasons[-1])
            except Busy as busy:
                reasons.append(str(busy) or "given up")
            except ServerGone as gone:
                reasons.append(str(gone))
                if member.alive and not await self._readmit(member):
                    self._lose(member, str(gone))
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is None or current.cancelling():  # the caller cancelled, and not `_lose`
                    raise
                reasons.append(member.reason)
            finally:
                task.cancel()
                member.calls.discard(task)
                self._release(member)
        raise UserError(f"request {call.id} failed on {_MAX_ATTEMPTS} attempts, the last time: {reasons[-1]}")

    async def _readmit(self, member: _Member[C]) -> bool:
        """Admit the server again after a dropped connection, once for all calls that saw it: another may answer now."""
        if member.readmission is None or member.readmission.done():
            member.readmission = asyncio.create_task(self._try_to_admit(member))
        return await asyncio.shield(member.readmission)

    async def _acquire(self) -> _Member[C]:
        """Return the least loaded live server, once one has room for another call."""
        if self._failure is not None:
            raise self._failure
        slot: asyncio.Future[_Member[C]] = asyncio.get_running_loop().create_future()
        self._waiting.append(slot)
        self._assign()
        self._num_waiting += 1
        self._update_timer()
        try:
            return await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():  # assigned together with the cancellation
                self._release(slot.result())
            raise
        finally:
            self._num_waiting -= 1
            self._update_timer()

    def _release(self, member: _Member[C]) -> None:
        member.running -= 1
        self._assign()

    def _assign(self) -> None:
        """Assign free slots to the calls that have waited longest."""
        while self._waiting:
            free = [m for m in self._members if m.alive and m.running < m.client.connections]
            if not free:
                return
            slot = self._waiting.popleft()
            if not slot.done():
                member = min(free, key=lambda m: m.running / m.client.connections)
                member.running += 1
                slot.set_result(member)

    def _fail(self, error: Exception) -> None:
        """Raise the error in all waiting and future calls."""
        self._failure = error
        for slot in self._waiting:
            if not slot.done():
                slot.set_exception(error)
        self._waiting.clear()

    async def _try_to_admit(self, member: _Member[C]) -> bool:
        """Try to admit the server; return whether it was. Raises UserError."""
        try:
            limits = await self._admit(member.client)
        except (ServerGone, Busy) as error:
            member.reason, member.not_yet = str(error), isinstance(error, NotYet)
            self._update_timer()
            return False
        # what all servers accept
        self._limits = limits if self._limits is None else self._limits.intersect(limits)
        member.alive = True
        member.gone.clear()
        if self._failure is self._timeout_failure:
            self._failure = self._timeout_failure = None
        self._update_timer()
        self._assign()
        return True

    async def _monitor(self, member: _Member[C]) -> None:
        """Check a live server's health, or try to admit a lost one, until the pool is closed."""
        while True:
            if member.alive:
                with suppress(TimeoutError):
                    await asyncio.wait_for(member.gone.wait(), self._heartbeat_interval)
                if member.alive and not await member.client.reachable():
                    self._lose(member, "it does not answer any more")
                continue
            wait = wait_random_exponential(multiplier=self._readmission_wait, max=5.0)
            retrying = AsyncRetrying(retry=retry_if_result(lambda admitted: not admitted), wait=wait)
            try:
                await retrying(self._try_to_admit, member)
            except Exception as error:
                self._fail(error)
                return
            self._report(f"{self._kind} {member.client.url} is back")

    def _lose(self, member: _Member[C], reason: str) -> None:
        if not member.alive:
            return
        member.alive, member.not_yet, member.reason = False, False, reason
        self._lost.add(member.client)
        member.gone.set()
        for call in member.calls:
            call.cancel()
        unfinished = f"; its {len(member.calls)} unfinished requests go elsewhere" if member.calls else ""
        self._report(f"{self._kind} {member.client.url} is gone: {reason}{unfinished}")
        self._report_if_all_down()

    def _report_if_all_down(self) -> None:
        if not any(member.alive for member in self._members):
            limit = f"{self._unavailable_timeout:g} s"
            self._report(f"all {self._kind}s are down: waiting for one of them, for {limit} at the most")
            self._update_timer()

    def _update_timer(self) -> None:
        """Run the timer while calls wait and no server is alive."""
        if self._failure is None and self._num_waiting and not any(m.alive or m.not_yet for m in self._members):
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._unavailable_timeout, self._give_up)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        reasons = "; ".join(f"{m.client.url}: {m.reason}" for m in self._members)
        error = UserError(f"no {self._kind} has been there for {self._unavailable_timeout:g} s ({reasons})")
        self._timeout_failure = error
        self._fail(error)
