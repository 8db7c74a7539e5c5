"""Several servers as one: each request goes to the one with the least to do, and to another one when that dies.

A call has one attempt at a time and ends with one answer, whatever happens to the servers meanwhile. A server
that dropped a connection and does not answer, or was reported dead by whoever watches its process, gets no more work;
its unfinished calls go to the others. It is asked again and again, and gets work when `admit` lets it in.
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
from eaopd_megatron.serving.http import Busy, ServerGone
from eaopd_megatron.utils.log import log_rank0

_MAX_ATTEMPTS = 8
"""After so many servers that died or gave up under one call, the call is the likelier cause."""


class PoolClient(Protocol):
    """A server's client, as far as the pool needs it."""

    @property
    def url(self) -> str: ...

    @property
    def connections(self) -> int:
        """Calls that run on it at the same time."""

    async def reachable(self) -> bool:
        """Whether anything answers."""

    async def close(self) -> None: ...


class PoolLimits(Protocol):
    """What a server can take."""

    def intersect(self, other: Self) -> Self:
        """What two servers can both take."""


C = TypeVar("C", bound=PoolClient)
L = TypeVar("L", bound=PoolLimits)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
C_contra = TypeVar("C_contra", bound=PoolClient, contravariant=True)
L_contra = TypeVar("L_contra", bound=PoolLimits, contravariant=True)


class StaleServer(Exception):
    """The server answers, and must not work on: what it has is not what it was admitted with."""


class NotYet(Busy):
    """The server is there, and gets work once whoever uses the pool has done something about it."""


class PoolCall(Protocol[C_contra, L_contra, T_co]):
    """Work that any of the servers can do."""

    @property
    def id(self) -> str:
        """Unique among the calls of one `Pool.run`."""

    def validate(self, limits: L_contra) -> None:
        """Raises UserError for what would end a server with these limits."""

    async def attempt(self, client: C_contra, number: int) -> T_co:
        """The answer. Raises ServerGone, Busy (ask again), Unfit, UserError; cancelled when the server is lost."""


@dataclass(eq=False)
class _Member(Generic[C]):
    """A server with what it is doing."""

    client: C
    alive: bool = False
    held: bool = False  # not alive, but there
    reason: str = "not asked yet"  # why it is not alive
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set when it dies, for those who wait for that
    check: asyncio.Task[bool] | None = None  # whether it is still there, and still the same
    running: int = 0  # calls
    calls: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def load(self) -> float:
        return self.running / self.client.connections


class ServerPool(Generic[C, L]):
    """Runs calls on servers. Everything happens in one event loop; `open` comes first and `close` last.

    admit: asked of each server before it gets work, at first and when it has come back. It returns what the server can
    take, or raises ServerGone or Busy (not yet), Held (not yet, and however late, it is no server that is down) or
    UserError (never: the pool fails).
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
        """kind: what messages call a server. all_down: seconds that calls wait without any server before the pool
        gives up. heartbeat: seconds between two looks at a server that works. return_wait: seconds before one that is
        gone is asked again; they grow."""
        self._members = [_Member(client) for client in clients]
        self._admit, self._all_down, self._heartbeat = admit, unavailable_timeout, heartbeat_interval
        self._return_wait, self._report, self._kind = readmission_wait, report, kind
        self._waiting: deque[asyncio.Future[_Member[C]]] = deque()  # calls without a server
        self._watches: list[asyncio.Task[None]] = []
        self._waiters = 0  # how many of them
        self._giving_up: asyncio.TimerHandle | None = None  # runs while they wait and no server is there
        self._failure: Exception | None = None
        self._gave_up: Exception | None = None  # the failure, if it is that no server was there
        self._limits: L | None = None
        self._lost: set[C] = set()

    async def open(self) -> None:
        """Admits the servers that are there; the others are waited for in the background. Raises UserError."""
        await asyncio.gather(*(self._try(member) for member in self._members))
        self._note_down()
        self._watches = [asyncio.create_task(self._watch(member)) for member in self._members]

    async def run(self, calls: Sequence[PoolCall[C, L, T]]) -> AsyncGenerator[T]:
        """One answer a call, each as soon as it is there.

        All calls are checked before the first attempt. Raises UserError for a bad one, for a server that answers
        nonsense, and when calls have waited for `all_down` seconds without a server. Close the iterator to give the
        rest up.
        """
        if len({call.id for call in calls}) != len(calls):
            raise ValueError("two calls have the same id")
        if self._limits is None:  # no server has been there yet
            self._release(await self._acquire())
        assert self._limits is not None
        for call in calls:
            call.validate(self._limits)
        tasks = [asyncio.create_task(self._complete(call)) for call in calls]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def available(self) -> list[C]:
        """The servers that get work."""
        return [member.client for member in self._members if member.alive]

    def take_lost(self) -> set[C]:
        """The servers that were lost since this was last asked; from any thread."""
        taken, self._lost = self._lost, set()
        return taken

    def mark_lost(self, client: C, reason: str) -> None:
        """Told by whoever knows that a server is dead, or must not work on; it has to be admitted anew."""
        for member in self._members:
            if member.client is client:
                self._lose(member, reason)

    async def close(self) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
        for task in self._watches:
            task.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for member in self._members:
            await member.client.close()

    async def _complete(self, wanted: PoolCall[C, L, T]) -> T:
        seen: list[str] = []
        for attempt in range(_MAX_ATTEMPTS):
            member = await self._acquire()
            call = asyncio.ensure_future(wanted.attempt(member.client, attempt))
            member.calls.add(call)
            try:
                return await call
            except StaleServer as unfit:
                seen.append(str(unfit))
                self._lose(member, seen[-1])
            except Busy as busy:
                seen.append(str(busy) or "given up")
            except ServerGone as gone:
                seen.append(str(gone))
                if member.alive and not await self._still_there(member):
                    self._lose(member, str(gone))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():  # it is this call that is no longer wanted
                    raise
                seen.append(member.reason)
            finally:
                call.cancel()
                member.calls.discard(call)
                self._release(member)
        raise UserError(f"request {wanted.id} failed on {_MAX_ATTEMPTS} attempts, the last time: {seen[-1]}")

    async def _still_there(self, member: _Member[C]) -> bool:
        """After a dropped connection: asked once for all calls that saw it. Admits the server anew, because what
        answers now may be another one."""
        if member.check is None or member.check.done():
            member.check = asyncio.create_task(self._try(member))
        return await asyncio.shield(member.check)

    async def _acquire(self) -> _Member[C]:
        """A place on the live server with the least to do, as soon as there is one."""
        if self._failure is not None:
            raise self._failure
        seat: asyncio.Future[_Member[C]] = asyncio.get_running_loop().create_future()
        self._waiting.append(seat)
        self._assign()
        self._waiters += 1
        self._time()
        try:
            return await seat
        except asyncio.CancelledError:
            if seat.done() and not seat.cancelled():  # it came together with the cancellation
                self._release(seat.result())
            raise
        finally:
            self._waiters -= 1
            self._time()

    def _release(self, member: _Member[C]) -> None:
        member.running -= 1
        self._assign()

    def _assign(self) -> None:
        """Gives the free places to those who have waited longest."""
        while self._waiting:
            free = [m for m in self._members if m.alive and m.running < m.client.connections]
            if not free:
                return
            seat = self._waiting.popleft()
            if not seat.done():
                member = min(free, key=lambda m: m.load)
                member.running += 1
                seat.set_result(member)

    def _fail(self, error: Exception) -> None:
        """The pool serves nobody any more."""
        self._failure = error
        for seat in self._waiting:
            if not seat.done():
                seat.set_exception(error)
        self._waiting.clear()

    async def _try(self, member: _Member[C]) -> bool:
        """Whether the server is admitted. Raises UserError."""
        try:
            limits = await self._admit(member.client)
        except (ServerGone, Busy) as error:
            member.reason, member.held = str(error), isinstance(error, NotYet)
            self._time()
            return False
        # of servers that differ, what all can take
        self._limits = limits if self._limits is None else self._limits.intersect(limits)
        member.alive = True
        member.gone.clear()
        if self._failure is self._gave_up:
            self._failure = self._gave_up = None
        self._time()
        self._assign()
        return True

    async def _watch(self, member: _Member[C]) -> None:
        """Looks at a server for as long as the pool lives."""
        while True:
            if member.alive:
                with suppress(TimeoutError):
                    await asyncio.wait_for(member.gone.wait(), self._heartbeat)
                if member.alive and not await member.client.reachable():
                    self._lose(member, "it does not answer any more")
                continue
            wait = wait_random_exponential(multiplier=self._return_wait, max=5.0)
            try:
                await AsyncRetrying(retry=retry_if_result(lambda there: not there), wait=wait)(self._try, member)
            except Exception as error:
                self._fail(error)
                return
            self._report(f"{self._kind} {member.client.url} is back")

    def _lose(self, member: _Member[C], reason: str) -> None:
        if not member.alive:
            return
        member.alive, member.held, member.reason = False, False, reason
        self._lost.add(member.client)
        member.gone.set()
        for call in member.calls:
            call.cancel()
        unfinished = f"; its {len(member.calls)} unfinished requests go elsewhere" if member.calls else ""
        self._report(f"{self._kind} {member.client.url} is gone: {reason}{unfinished}")
        self._note_down()

    def _note_down(self) -> None:
        if not any(member.alive for member in self._members):
            self._report(f"all {self._kind}s are down: waiting for one of them, for {self._all_down:g} s at the most")
            self._time()

    def _time(self) -> None:
        """The time until the pool gives up runs as long as calls wait and no server is there."""
        if self._failure is None and self._waiters and not any(m.alive or m.held for m in self._members):
            if self._giving_up is None:
                self._giving_up = asyncio.get_running_loop().call_later(self._all_down, self._give_up)
        elif self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None

    def _give_up(self) -> None:
        self._giving_up = None
        reasons = "; ".join(f"{m.client.url}: {m.reason}" for m in self._members)
        self._gave_up = UserError(f"no {self._kind} has been there for {self._all_down:g} s ({reasons})")
        self._fail(self._gave_up)
