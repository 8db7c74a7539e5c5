"""The servers of a run, on its main rank: started or found, identified, and started again when they die."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.interface import GenerationRequest
from eaopd_megatron.rollout.sglang.generation import BackgroundGeneration
from eaopd_megatron.rollout.sglang.identity import (
    ROUTER_READY_PATH,
    ExpectedModel,
    ServerPaused,
    verify_server,
    verify_workers,
    worker_urls,
)
from eaopd_megatron.rollout.sglang.server import SGLangServer, SGLangSettings
from eaopd_megatron.rollout.sglang.wire import RESERVED_TOKENS, SLACK_TOKENS, LengthLimits
from eaopd_megatron.rollout.weight_sync.session import resume_generation
from eaopd_megatron.serving.client import Busy, ServerGone, SGLangClient, read_api_key
from eaopd_megatron.serving.pool import NotYet, ServerPool
from eaopd_megatron.serving.process import stop_servers, wait_until_serving
from eaopd_megatron.serving.readiness import Arrival, EventLoopThread, poll_until_done

MAX_RESTARTS = 5
"""A server that dies so often in a row, without having served, is not started again."""


class ServerManager:
    """Its public methods are called by the main thread; `loop` runs whatever talks to servers."""

    def __init__(
        self, recipe: Recipe, folder: HfFolder, logs: Path, *, first_gpu: int, report: Callable[[str], None]
    ) -> None:
        """logs: folder of the logs of servers started here. first_gpu: of the first of them, among the visible ones."""
        self._recipe, self._folder, self._logs = recipe, folder, logs
        self._first_gpu, self._report = first_gpu, report
        self.loop = EventLoopThread()
        self._arrival = Arrival("rollout server", recipe.servers.startup_timeout_minutes, report)
        self.expected: ExpectedModel
        self.clients: list[SGLangClient] = []  # one a server, also where a router is in front of them
        self._pool: ServerPool[SGLangClient, LengthLimits] | None = None
        self._router: SGLangClient | None = None
        self._allowed_versions: frozenset[str] = frozenset()  # versions of weights that may answer
        self._outdated: dict[SGLangClient, None] = {}  # there, with weights of another version
        self._update_failed: set[SGLangClient] = set()  # could not be given weights when they were last sent
        self._started: list[SGLangServer] = []
        self._server_of: dict[SGLangClient, SGLangServer] = {}
        self._deaths: Counter[SGLangClient] = Counter()
        self._stopped: list[SGLangClient] | None = (
            None  # dead ones that wait to be started; none: they are started at once
        )
        # the kernel ends the servers with the thread that started them: one thread starts them all, and lives on
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="servers")
        self._starting: Future[None] | None = None
        self._key: str | None = None

    def start(self, total: int) -> None:
        """Begins to start the servers, if it is the trainer that starts them. total: tokens of a prompt and its
        response, at the most."""
        chosen = self._recipe.servers
        config = self._folder.config.to_dict()
        self.expected = ExpectedModel(self._folder.family.architecture, self._folder.vocab_size, total, config=config)
        self.loop.__enter__()
        if not chosen.launched_by_trainer:
            self._key = None if chosen.api_key_file is None else read_api_key(Path(chosen.api_key_file))
            return
        self._key = secrets.token_urlsafe(24)
        settings = rollout_server_settings(self._recipe, self._folder, total, self._key)
        self._started = [
            SGLangServer(
                settings, self._logs / f"server_{i}.log", first_gpu=self._first_gpu + i * chosen.tensor_parallel
            )
            for i in range(chosen.count)
        ]
        self._starting = self._starter.submit(self._start)

    def wait_until_ready(self) -> Iterator[None]:
        """Ends when the servers are there and are what they should be; yields while they are not. Raises UserError."""
        chosen = self._recipe.servers
        if self._starting is not None:
            yield from poll_until_done(self._starting)
            self._server_of = {self._client(server.url): server for server in self._started}
            self.clients = list(self._server_of)
        elif chosen.router is None:
            self.clients = [self._client(url) for url in chosen.urls]
        else:
            self._router = self._client(chosen.router, ROUTER_READY_PATH)
            urls = yield from poll_until_done(self.loop.submit(self._arrival.of(self._router, worker_urls)))
            self.clients = [self._client(url) for url in urls]
            self._router.connections *= max(1, len(urls))  # it is one client for the work of all of them
        yield from poll_until_done(self.loop.submit(self._identify_all()))
        for client, server in self._server_of.items():
            server.remove_key_file()
            server.on_exit = partial(self._died, client)

    def set_allowed_versions(self, versions: Iterable[int]) -> None:
        """Weights of these versions may answer from now on; a server with others waits for weights."""
        self._allowed_versions = frozenset(map(str, versions))
        if self._pool is None:
            self._pool = ServerPool(
                self.clients if self._router is None else [self._router],
                self._admit,
                unavailable_timeout=60 * self._recipe.servers.unavailable_timeout_minutes,
                report=self._report,
            )
            self.loop.run(self._pool.open())

    def submit(self, request: GenerationRequest) -> BackgroundGeneration:
        """The servers begin to write the responses."""
        assert self._pool is not None, "serve comes first"
        return BackgroundGeneration(
            self.loop, self._pool, request.prompts, request.sampling, lambda: self._allowed_versions
        )

    def outdated(self) -> list[SGLangClient]:
        """Servers that are there and wait for the student's weights."""
        return list(self._outdated)

    def available(self) -> list[SGLangClient]:
        """Servers that can be given weights."""
        if not self.loop.running or self._pool is None or self._router is not None:
            return list(self.clients)
        return [*self._pool.available(), *self._outdated]

    def mark_updated(self, clients: Iterable[SGLangClient], failed: Mapping[SGLangClient, str]) -> None:
        """These have been given weights, but for those that failed, which are lost."""
        for client in clients:
            self._outdated.pop(client, None)
            if client not in failed:
                self._update_failed.discard(client)
                self._deaths[client] = 0  # it came up whole, whatever ends it before it has been asked for anything
        for client, reason in failed.items():
            self._update_failed.add(client)
            if self._pool is not None and self._router is None:
                self.loop.call_soon(self._pool.mark_lost, client, reason)
            else:
                self._report(f"rollout server {client.url} did not get the student's weights: {reason}")

    def take_lost(self) -> set[SGLangClient]:
        """The servers that were lost since this was last asked."""
        return set() if self._pool is None else self._pool.take_lost()

    def probe_weights(self) -> None:
        """The probe on every server that is there. Raises UserError for one that holds other weights."""

        async def compared() -> None:
            found = await asyncio.gather(
                *(verify_server(c, self.expected) for c in self.available()), return_exceptions=True
            )
            for one in found:
                if isinstance(one, UserError):
                    raise one

        self.loop.run(compared())

    def restart_stopped(self) -> None:
        """Servers that died since `end_absent_ones` are started, and from now on at once."""
        held, self._stopped = self._stopped or [], None
        for client in held:
            self._restart(client)

    def stop_unreachable(self) -> None:
        """Servers that are not there, which may be starting, are ended, and none is started until `start_dead_ones`."""
        self._stopped = []
        for client in set(self._server_of) - set(self.available()):
            server = self._server_of[client]
            server.stop()
            server.on_exit = partial(self._died, client)
            self._stopped.append(client)

    def close(self) -> None:
        """Ends the servers that were started here. A second call does nothing."""
        for server in self._started:
            server.on_exit = None
        if self.loop.running:
            self.loop.run(self._close())
            self.loop.__exit__()
        stop_servers(self._started)
        self._started, self._server_of, self.clients, self._pool = [], {}, [], None
        self._starter.shutdown(cancel_futures=True)

    # Servers started here

    def _start(self) -> None:
        for server in self._started:
            server.start()
        wait_until_serving(self._started, limit=60 * self._recipe.servers.startup_timeout_minutes, report=self._report)

    def _died(self, client: SGLangClient, why: str) -> None:
        """From a thread of the server's."""
        self._outdated.pop(client, None)
        if self._pool is not None:
            self.loop.call_soon(self._pool.mark_lost, client, why)
        self._deaths[client] += 1
        if self._deaths[client] >= MAX_RESTARTS:
            self._report(
                f"rollout server {client.url} died {MAX_RESTARTS} times in a row and is not started again: it {why}"
            )
        elif self._stopped is None:
            self._restart(client)
        else:
            self._stopped.append(client)

    def _restart(self, client: SGLangClient) -> None:
        self._starter.submit(self._server_of[client].start)

    # In the event loop

    def _client(self, url: str, ready_path: str = "/ready") -> SGLangClient:
        known = next((client for client in self.clients if client.url == url.rstrip("/")), None)
        connections = self._recipe.servers.max_concurrent_requests
        return known or SGLangClient(url, api_key=self._key, connections=connections, ready_path=ready_path)

    async def _identify_all(self) -> None:
        """Raises UserError where one is not what it should be, or none is there."""
        await self._arrival.of_all(self.clients, self._identify_first)
        if not self.clients:
            assert self._router is not None
            raise UserError(f"the router {self._router.url} has no servers: start it with --worker-urls")

    async def _identify_first(self, client: SGLangClient) -> LengthLimits:
        """Before any update of this run: a server that is paused was left so by a run that was killed in one."""
        try:
            return await verify_server(client, self.expected)
        except ServerPaused:
            self._report(f"rollout server {client.url} is paused by an update that broke off: it is continued")
            await resume_generation(client)
            return await verify_server(client, self.expected)

    async def _admit(self, client: SGLangClient) -> LengthLimits:
        """What `Pool` asks of each server before it gets work."""
        if client is not self._router:
            return await self._admit_server(client)
        try:
            limits = await verify_workers(client, self._admit_server, self._client)
        except ServerGone:
            if not self._outdated:
                raise
        if self._outdated:  # the router would send requests to those as well
            raise self._waits("some of its servers wait", *self._outdated)
        return limits

    async def _admit_server(self, client: SGLangClient) -> LengthLimits:
        try:
            limits = await verify_server(client, self.expected)
            version = str((await client.model_info()).get("weight_version"))
        except ServerGone:
            self._outdated.pop(client, None)
            raise
        except (
            ServerPaused
        ) as paused:  # an update may be running: only new weights, which end it, let the server continue
            self._outdated[client] = None
            raise self._waits(f"{paused} and waits", client) from None
        if version not in self._allowed_versions:
            self._outdated[client] = None
            raise self._waits(f"it has weights '{version}' and waits", client)
        self._outdated.pop(client, None)
        self._update_failed.discard(client)
        self._deaths[client] = 0
        if client in self._server_of:
            self._server_of[client].remove_key_file()
        return limits

    def _waits(self, what: str, *clients: SGLangClient) -> Busy:
        """For weights, which come when the main thread has time: it may train. Not so for ever, where they have come
        and could not be taken."""
        why = f"{what} for the student's weights"
        return Busy(why) if self._update_failed.intersection(clients) else NotYet(why)

    async def _close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        for client in self.clients:
            await client.close()


def rollout_server_settings(recipe: Recipe, student: HfFolder, total_tokens: int, key: str) -> SGLangSettings:
    """Of a server that writes the recipe's responses. total_tokens: of a prompt and its response, at the most."""
    chosen = recipe.servers
    return SGLangSettings(
        student.path,
        total_tokens + RESERVED_TOKENS + SLACK_TOKENS,
        tensor_parallel=chosen.tensor_parallel,
        precision=recipe.student.precision,
        mem_fraction_static=chosen.mem_fraction_static,
        max_concurrent_requests=chosen.max_concurrent_requests,
        api_key=key,
        colocated=chosen.placement == "colocated",
    )
