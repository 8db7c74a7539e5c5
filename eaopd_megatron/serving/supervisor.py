"""Servers that are started, and started again when they die, until they are no longer wanted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from eaopd_megatron.serving.process import ServerProcess, stop_servers, wait_until_serving
from eaopd_megatron.utils.log import log_rank0

DEATHS = 3
"""A server that dies so often in a row, without having served, is not started again."""
_POLL_SECONDS = 0.2


class Supervisor:
    """One thread starts all of them, because the kernel ends a server with the thread that started it."""

    def __init__(
        self, servers: Sequence[ServerProcess], *, minutes: float, report: Callable[[str], None] = log_rank0
    ) -> None:
        """minutes: for all to serve, at first."""
        self.ready: Future[None] = Future()
        """Done once all have served; a UserError where one did not come to."""
        self._servers, self._minutes, self._report = servers, minutes, report
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """They are started in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Ends them all. A second call does nothing."""
        self._ending.set()
        while self._thread.is_alive():
            if not self.ready.done():  # it waits for them, and may be about to start one
                stop_servers(self._servers)
            self._thread.join(_POLL_SECONDS)

    def _run(self) -> None:
        try:
            self._supervise()
        finally:
            stop_servers(self._servers)  # before this thread ends, and they with it

    def _supervise(self) -> None:
        try:
            for server in self._servers:
                server.start()
            wait_until_serving(self._servers, limit=60 * self._minutes, report=self._report)
        except Exception as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        deaths: Counter[ServerProcess] = Counter()
        starting: set[ServerProcess] = set()
        while not self._ending.wait(_POLL_SECONDS):
            for server in self._servers:
                if server.alive():
                    if server in starting and server.ready():
                        starting.remove(server)
                        deaths[server] = 0
                elif deaths[server] < DEATHS:
                    deaths[server] += 1
                    starting.add(server)
                    self._restart(server, deaths[server])

    def _restart(self, server: ServerProcess, deaths: int) -> None:
        if deaths == DEATHS:
            self._report(
                f"{server.kind} {server.url} died {DEATHS} times in a row and is not started again: "
                f"it {server.exit_reason()}"
            )
        elif not self._ending.is_set():
            self._report(f"{server.kind} {server.url} is started again: it {server.exit_reason()}")
            server.start()
