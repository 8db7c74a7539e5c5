"""The servers of a run, on its main rank: started or found by URL, verified, and restarted when they die."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config.schema import ServersConfig
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.interface import GenerationRequest
from eaopd_megatron.rollout.sglang.identity import (
    ROUTER_READY_PATH,
    ExpectedModel,
    ServerPaused,
    verify_server,
    verify_workers,
    worker_urls,
)
from eaopd_megatron.rollout.sglang.requests import BackgroundGeneration, LengthLimits, required_context_length
from eaopd_megatron.rollout.sglang.server import SGLangServer, SGLangSettings, sglang_servers
from eaopd_megatron.rollout.weight_sync.session import resume_generation
from eaopd_megatron.serving.http import Busy, EventLoopThread, ServerGone, SGLangClient, poll_until_done, read_api_key
from eaopd_megatron.serving.pool import NotYet, ServerPool
from eaopd_megatron.serving.supervisor import RestartPolicy, Supervisor, wait_until_any_ready

_RESTARTS = RestartPolicy(4, reset_after_ready=False)  # reset once a server took weights or was admitted


class ServerManager:
    """The main thread calls the public methods; `loop` runs whatever talks to servers."""

    def __init__(
        self,
        config: ServersConfig,
        student: HfFolder,
        precision: str,
        logs: Path,
        *,
        first_gpu: int,
        report: Callable[[str], None],
    ) -> None:
        """logs: folder of the logs of servers started here. first_gpu: of the first server, among the visible ones."""
        self._config, self._student, self._precision, self._logs = config, student, precision, logs
        self._first_gpu, self._report = first_gpu, report
        self.loop = EventLoopThread()
        self._startup: dict[str, Any] = {
            "kind": "rollout server",
            "minutes": config.startup_timeout_minutes,
            "report": report,
        }
        self._started: list[SGLangServer] = []
        self.expected: ExpectedModel
        self.clients: list[SGLangClient] = []  # one per server, also behind a router
        self._pool: ServerPool[SGLangClient, LengthLimits] | None = None
        self._router: SGLangClient | None = None
        self._allowed_versions: frozenset[str] = frozenset()  # of weights that may answer
        self._outdated: dict[SGLangClient, None] = {}  # reachable, with weights of another version
        self._update_failed: set[SGLangClient] = set()  # did not take the weights that were sent last
        self._supervisor: Supervisor | None = None  # of servers started here
        self._server_of: dict[SGLangClient, SGLangServer] = {}
        self._key: str | None = None

    def start(self, total_tokens: int) -> None:
        """Start the servers in the background, unless they run already. total_tokens: maximum of a prompt and its
        response."""
        config = self._config
        self.expected = ExpectedModel.of(self._student, total_tokens)
        self.loop.__enter__()
        if not config.launched_by_trainer:
            self._key = None if config.api_key_file is None else read_api_key(Path(config.api_key_file))
            return
        self._key = secrets.token_urlsafe(24)
        settings = rollout_server_settings(config, self._student, self._precision, total_tokens, self._key)
        self._started = sglang_servers(settings, config.count, self._logs, first_gpu=self._first_gpu)
        self._supervisor = Supervisor(
            self._started, minutes=config.startup_timeout_minutes, policy=_RESTARTS, report=self._report
        )
        self._supervisor.start()

    def wait_until_ready(self) -> Iterator[None]:
        """Yield until the servers serve and are verified. Raises UserError."""
        config = self._config
        if self._supervisor is not None:
            yield from poll_until_done(self._supervisor.ready)
            self._server_of = {self._client(server.url): server for server in self._started}
            self.clients = list(self._server_of)
        elif config.router is None:
            self.clients = [self._client(url) for url in config.urls]
        else:
            self._router = self._client(config.router, ROUTER_READY_PATH)
            waiting = wait_until_any_ready([self._router], worker_urls, **self._startup)
            (urls,) = yield from poll_until_done(self.loop.submit(waiting))
            self.clients = [self._client(url) for url in urls]
            self._router.connections *= max(1, len(urls))  # it is one client for the work of all servers
        yield from poll_until_done(self.loop.submit(self._verify_all()))
        for client, server in self._server_of.items():
            server.remove_key_file()
            server.on_exit = partial(self._server_died, client)

    def set_allowed_versions(self, versions: Iterable[int]) -> None:
        """Accept responses of these weights from now on; servers with others wait for an update."""
        self._allowed_versions = frozenset(map(str, versions))
        if self._pool is None:
            self._pool = ServerPool(
                self.clients if self._router is None else [self._router],
                self._admit,
                unavailable_timeout=60 * self._config.unavailable_timeout_minutes,
                report=self._report,
            )
            self.loop.run(self._pool.open())

    def submit(self, request: GenerationRequest) -> BackgroundGeneration:
        assert self._pool is not None, "set_allowed_versions comes first"
        return BackgroundGeneration(
            self.loop, self._pool, request.prompts, request.sampling, lambda: self._allowed_versions
        )

    def outdated(self) -> list[SGLangClient]:
        """Return the reachable servers that wait for the student's weights."""
        return list(self._outdated)

    def available(self) -> list[SGLangClient]:
        """Return the servers that can take weights."""
        if not self.loop.running or self._pool is None or self._router is not None:
            return list(self.clients)
        return [*self._pool.available(), *self._outdated]

    def mark_updated(self, clients: Iterable[SGLangClient], failed: Mapping[SGLangClient, str]) -> None:
        """Record that these servers took the current weights, except for those that failed, which are lost."""
        for client in clients:
            self._outdated.pop(client, None)
            if client not in failed:
                self._mark_healthy(client)
        for client, reason in failed.items():
            self._update_failed.add(client)
            if self._pool is not None and self._router is None:
                self.loop.call_soon(self._pool.mark_lost, client, reason)
            else:
                self._report(f"rollout server {client.url} did not get the student's weights: {reason}")

    def take_lost(self) -> set[SGLangClient]:
        """Return the servers that were lost since the previous call."""
        return set() if self._pool is None else self._pool.take_lost()

    def probe_weights(self) -> None:
        """Compare the log-probs of the probe on every available server. Raises UserError for other weights."""

        async def probe() -> list[Any]:
            checks = (verify_server(client, self.expected) for client in self.available())
            return await asyncio.gather(*checks, return_exceptions=True)

        for result in self.loop.run(probe()):
            if isinstance(result, UserError):
                raise result

    def restart_stopped(self) -> None:
        """Start the servers that `stop_unreachable` stopped or that died since; restart dead ones from now on."""
        if self._supervisor is not None:
            self._supervisor.resume()

    def stop_unreachable(self) -> None:
        """Stop servers that are not available, e.g. starting; start none until `restart_stopped`."""
        if self._supervisor is None:
            return
        unreachable = set(self._server_of) - set(self.available())
        self._supervisor.pause([self._server_of[client] for client in unreachable])
        for client in unreachable:
            self._server_of[client].on_exit = partial(self._server_died, client)

    def close(self) -> None:
        """Stop the servers that were started here. Idempotent."""
        for server in self._server_of.values():
            server.on_exit = None
        if self.loop.running:
            self.loop.run(self._close_clients())
            self.loop.__exit__()
        if self._supervisor is not None:
            self._supervisor.stop()
        self._supervisor, self._server_of, self.clients, self._pool = None, {}, [], None

    def _server_died(self, client: SGLangClient, reason: str) -> None:
        """Called from a thread of the server's."""
        self._outdated.pop(client, None)
        if self._pool is not None:
            self.loop.call_soon(self._pool.mark_lost, client, reason)

    def _mark_healthy(self, client: SGLangClient) -> None:
        self._update_failed.discard(client)
        if self._supervisor is not None and client in self._server_of:
            self._supervisor.reset(self._server_of[client])

    # In the event loop

    def _client(self, url: str, ready_path: str = "/ready") -> SGLangClient:
        known = next((client for client in self.clients if client.url == url.rstrip("/")), None)
        connections = self._config.max_concurrent_requests
        return known or SGLangClient(url, api_key=self._key, connections=connections, ready_path=ready_path)

    async def _verify_all(self) -> None:
        """Raise UserError if a server is not the expected one, or if there is none."""
        await wait_until_any_ready(self.clients, self._verify_first, **self._startup)
        if not self.clients:
            assert self._router is not None
            raise UserError(f"the router {self._router.url} has no servers: start it with --worker-urls")

    async def _verify_first(self, client: SGLangClient) -> LengthLimits:
        """Verify before any update of this run: a paused server was left so by a run that was killed in an update."""
        try:
            return await verify_server(client, self.expected)
        except ServerPaused:
            self._report(f"rollout server {client.url} is paused by an update that broke off: it is continued")
            await resume_generation(client)
            return await verify_server(client, self.expected)

    async def _admit(self, client: SGLangClient) -> LengthLimits:
        """Admit a server, or those behind the router, to the pool."""
        if client is not self._router:
            return await self._admit_server(client)
        try:
            limits = await verify_workers(client, self._admit_server, self._client, self.clients)
        except ServerGone:
            if not self._outdated:
                raise
        if self._outdated:  # the router would send requests to those as well
            raise self._needs_weights("some of its servers wait", *self._outdated)
        return limits

    async def _admit_server(self, client: SGLangClient) -> LengthLimits:
        try:
            limits = await verify_server(client, self.expected)
            version = str((await client.model_info()).get("weight_version"))
        except ServerGone:
            self._outdated.pop(client, None)
            raise
        except ServerPaused as paused:  # an update may be running: only new weights, which end it, may continue it
            self._outdated[client] = None
            raise self._needs_weights(f"{paused} and waits", client) from None
        if version not in self._allowed_versions:
            self._outdated[client] = None
            raise self._needs_weights(f"it has weights '{version}' and waits", client)
        self._outdated.pop(client, None)
        self._mark_healthy(client)
        if client in self._server_of:
            self._server_of[client].remove_key_file()
        return limits

    def _needs_weights(self, what: str, *clients: SGLangClient) -> Busy:
        """Return NotYet: waiting for an update is no downtime, because the main thread may be training. After an update
        that failed it is."""
        reason = f"{what} for the student's weights"
        return Busy(reason) if self._update_failed.intersection(clients) else NotYet(reason)

    async def _close_clients(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        for client in (*self.clients, *([] if self._router is None else [self._router])):
            await client.close()


def rollout_server_settings(
    config: ServersConfig, student: HfFolder, precision: str, total_tokens: int, key: str
) -> SGLangSettings:
    """Return the settings of a server for the recipe's rollouts. total_tokens: maximum of a prompt and its response."""
    return SGLangSettings(
        student.path,
        required_context_length(total_tokens),
        tensor_parallel=config.tensor_parallel,
        precision=precision,
        mem_fraction_static=config.mem_fraction_static,
        max_concurrent_requests=config.max_concurrent_requests,
        api_key=key,
        colocated=config.placement == "colocated",
    )
