"""Start servers, wait until they serve, and restart those that die, under one restart policy."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_fixed

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import Busy, HttpClient, ServerGone
from eaopd_megatron.serving.process import BIND_ATTEMPTS, ServerProcess, stop_servers
from eaopd_megatron.utils.log import log_rank0

_POLL_SECONDS = 0.2
_READY_REPORT_ATTEMPTS = 15  # one a second
C = TypeVar("C", bound=HttpClient)
T = TypeVar("T")


@dataclass
class RestartPolicy:
    """Restart a process that died up to `max_restarts` times in a row. reset_after_ready: once the process is ready,
    the count starts anew; otherwise only `reset` does that."""

    max_restarts: int
    reset_after_ready: bool = True
    deaths: int = 0  # in a row

    def allows_restart(self) -> bool:
        """Count a death; return whether to restart the process."""
        self.deaths += 1
        return not self.exhausted

    @property
    def exhausted(self) -> bool:
        return self.deaths > self.max_restarts

    def reset(self) -> None:
        self.deaths = 0


class Supervisor:
    """Runs servers in the background; as a context manager, from when all serve. One thread starts them all, because
    the kernel kills a server when the thread that started it ends."""

    def __init__(
        self,
        servers: Sequence[ServerProcess],
        *,
        minutes: float = 15.0,
        policy: RestartPolicy | None = None,
        report: Callable[[str], None] = log_rank0,
    ) -> None:
        """minutes: limit on the first start of all servers. policy: of each server, by default 2 restarts in a row."""
        self.servers = servers
        self.ready: Future[None] = Future()  # done once all servers served; holds a UserError if one failed to start
        policy = policy or RestartPolicy(2)
        self._policies = {server: RestartPolicy(policy.max_restarts, policy.reset_after_ready) for server in servers}
        self._minutes, self._report = minutes, report
        self._starting: set[ServerProcess] = set()
        self._stopped: set[ServerProcess] = set()  # on purpose, until `resume`
        self._paused = False
        self._lock = threading.Lock()  # held while servers are started or stopped
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        try:
            self.ready.result()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all servers in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Stop all servers. A second call does nothing."""
        self._ending.set()
        while self._thread.is_alive():
            if not self.ready.done():  # the thread may be about to start one
                stop_servers(self.servers)
            self._thread.join(_POLL_SECONDS)

    def reset(self, server: ServerProcess) -> None:
        """Forget the deaths of a server that works."""
        self._policies[server].reset()

    def pause(self, servers: Iterable[ServerProcess]) -> None:
        """Stop these servers, and restart none until `resume`."""
        with self._lock:
            self._paused = True
            self._stopped.update(servers)
            stop_servers(list(self._stopped))

    def resume(self) -> None:
        """Start the servers that `pause` stopped or that died since."""
        with self._lock:
            self._paused = False

    def _run(self) -> None:
        try:
            for server in self.servers:
                server.start()
            wait_until_serving(self.servers, limit=60 * self._minutes, report=self._report)
        except BaseException as error:
            stop_servers(self.servers)
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while not self._ending.wait(_POLL_SECONDS):
                for server in self.servers:
                    self._look_at(server)
        finally:
            stop_servers(self.servers)  # before this thread ends, and they with it

    def _look_at(self, server: ServerProcess) -> None:
        policy = self._policies[server]
        if server.alive():
            if server in self._starting and policy.reset_after_ready and server.ready():
                self._starting.remove(server)
                policy.reset()
            return
        with self._lock:
            if self._paused or policy.exhausted or self._ending.is_set():
                return
            if server in self._stopped:
                self._stopped.remove(server)
            elif not policy.allows_restart():
                self._report(
                    f"{server.kind} {server.url} died {policy.deaths} times in a row and is not started again: "
                    f"it {server.exit_reason()}"
                )
                return
            else:
                self._report(f"{server.kind} {server.url} is started again: it {server.exit_reason()}")
            self._starting.add(server)
            try:
                server.start()
            except Exception as error:  # the next look counts it as a death; the other servers go on
                server.remove_key_file()
                self._report(f"{server.kind} {server.url} could not be started: {error}")


def wait_until_serving(
    servers: Sequence[ServerProcess],
    *,
    limit: float = 900.0,
    interval: float = 15.0,
    report: Callable[[str], None] = log_rank0,
) -> None:
    """Return when all servers serve. Raises UserError when one dies, or does not serve within `limit` seconds.

    report: gets a line every `interval` seconds and at the end.
    """
    kind, plural = servers[0].kind, "s" * (len(servers) > 1)
    started = reported = time.monotonic()
    waiting = dict.fromkeys(range(len(servers)), 1)  # index: starts
    report(f"starting {len(servers)} {kind}{plural}")
    while waiting:
        now = time.monotonic()
        for i in list(waiting):
            server = servers[i]
            if not server.alive():
                reason = server.exit_reason()
                if not server.port_was_taken() or waiting[i] == BIND_ATTEMPTS:
                    raise UserError(f"{kind} {i} did not start; it {reason}")
                waiting[i] += 1
                server.port = 0
                server.start()
            elif server.ready():
                del waiting[i]
            elif now - started > limit:
                raise UserError(f"{kind} {i} does not serve after {limit:g} s; it {server.exit_reason()}")
        if waiting and now - reported > interval:
            reported = now
            first = min(waiting)
            report(f"{kind} {first} is starting since {now - started:.0f} s: {servers[first].last_line()[:120]}")
        if waiting:
            time.sleep(_POLL_SECONDS)
    report(f"{len(servers)} {kind}{plural} ready after {time.monotonic() - started:.0f} s")


async def wait_until_any_ready(
    clients: Sequence[C],
    check: Callable[[C], Awaitable[T]],
    *,
    kind: str,
    minutes: float,
    report: Callable[[str], None],
) -> list[T]:
    """Return the results of `check` for the servers that answer within `minutes`.

    Raises UserError if none answers, and whatever `check` raises but ServerGone and Busy.
    """

    async def wait(client: C) -> T:
        def waiting(state: RetryCallState) -> None:
            if state.attempt_number % _READY_REPORT_ATTEMPTS == 1 and state.outcome is not None:
                report(f"waiting for {kind} {client.url}: {state.outcome.exception()}")

        retrying = AsyncRetrying(
            retry=retry_if_exception_type((ServerGone, Busy)),
            stop=stop_after_delay(60 * minutes),
            wait=wait_fixed(1.0),
            before_sleep=waiting,
            reraise=True,
        )
        return await retrying(check, client)

    results, missing = [], []
    for client, result in zip(clients, await asyncio.gather(*map(wait, clients), return_exceptions=True), strict=True):
        if isinstance(result, ServerGone | Busy):
            missing.append(f"{client.url}: {result}")
        elif isinstance(result, BaseException):
            raise result
        else:
            results.append(result)
    reasons, limit = "; ".join(missing), f"{minutes:g} minutes"
    if missing and not results:
        raise UserError(
            f"no {kind} is there after {limit} ({reasons}): start one, or raise its startup_timeout_minutes"
        )
    if missing:
        report(f"going on without {kind}s that are not there after {limit}: {reasons}")
    return results
