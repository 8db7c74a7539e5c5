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
from eaopd_megatron.rollout.interface import Wanted
from eaopd_megatron.rollout.sglang.generation import Writing
from eaopd_megatron.rollout.sglang.identity import READY_PATH, Expected, Paused, admit_workers, identify, worker_urls
from eaopd_megatron.rollout.sglang.server import Server, ServerSettings
from eaopd_megatron.rollout.sglang.wire import RESERVED_TOKENS, SLACK_TOKENS, Limits
from eaopd_megatron.rollout.weight_sync.session import resume
from eaopd_megatron.serving.client import Busy, Client, ServerGone, read_api_key
from eaopd_megatron.serving.pool import Held, Pool
from eaopd_megatron.serving.process import stop_all, wait_ready
from eaopd_megatron.serving.readiness import Arrival, Loop, until_done

DEATHS = 5
"""A server that dies so often in a row, without having served, is not started again."""


class Keeper:
    """Its public methods are called by the main thread; `loop` runs whatever talks to servers."""

    def __init__(
        self, recipe: Recipe, folder: HfFolder, logs: Path, *, first_gpu: int, report: Callable[[str], None]
    ) -> None:
        """logs: folder of the logs of servers started here. first_gpu: of the first of them, among the visible ones."""
        self._recipe, self._folder, self._logs = recipe, folder, logs
        self._first_gpu, self._report = first_gpu, report
        self.loop = Loop()
        self._arrival = Arrival("rollout server", recipe.servers.start_minutes, report)
        self.expected: Expected
        self.clients: list[Client] = []  # one a server, also where a router is in front of them
        self._pool: Pool[Client, Limits] | None = None
        self._router: Client | None = None
        self._wanted: frozenset[str] = frozenset()  # versions of weights that may answer
        self._stale: dict[Client, None] = {}  # there, with weights of another version
        self._refused: set[Client] = set()  # could not be given weights when they were last sent
        self._started: list[Server] = []
        self._server_of: dict[Client, Server] = {}
        self._deaths: Counter[Client] = Counter()
        self._held: list[Client] | None = None  # dead ones that wait to be started; none: they are started at once
        # the kernel ends the servers with the thread that started them: one thread starts them all, and lives on
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="servers")
        self._starting: Future[None] | None = None
        self._key: str | None = None

    def start(self, total: int) -> None:
        """Begins to start the servers, if it is the trainer that starts them. total: tokens of a prompt and its
        response, at the most."""
        chosen = self._recipe.servers
        config = self._folder.config.to_dict()
        self.expected = Expected(self._folder.family.architecture, self._folder.vocab_size, total, config=config)
        self.loop.__enter__()
        if not chosen.started:
            self._key = None if chosen.api_key_file is None else read_api_key(Path(chosen.api_key_file))
            return
        self._key = secrets.token_urlsafe(24)
        settings = server_settings(self._recipe, self._folder, total, self._key)
        self._started = [
            Server(settings, self._logs / f"server_{i}.log", first_gpu=self._first_gpu + i * chosen.tensor_parallel)
            for i in range(chosen.count)
        ]
        self._starting = self._starter.submit(self._start)

    def until_there(self) -> Iterator[None]:
        """Ends when the servers are there and are what they should be; yields while they are not. Raises UserError."""
        chosen = self._recipe.servers
        if self._starting is not None:
            yield from until_done(self._starting)
            self._server_of = {self._client(server.url): server for server in self._started}
            self.clients = list(self._server_of)
        elif chosen.router is None:
            self.clients = [self._client(url) for url in chosen.urls]
        else:
            self._router = self._client(chosen.router, READY_PATH)
            urls = yield from until_done(self.loop.begin(self._arrival.of(self._router, worker_urls)))
            self.clients = [self._client(url) for url in urls]
            self._router.connections *= max(1, len(urls))  # it is one client for the work of all of them
        yield from until_done(self.loop.begin(self._identify_all()))
        for client, server in self._server_of.items():
            server.forget_key_file()
            server.on_exit = partial(self._died, client)

    def serve(self, versions: Iterable[int]) -> None:
        """Weights of these versions may answer from now on; a server with others waits for weights."""
        self._wanted = frozenset(map(str, versions))
        if self._pool is None:
            self._pool = Pool(
                self.clients if self._router is None else [self._router],
                self._admit,
                all_down=60 * self._recipe.servers.all_down_minutes,
                report=self._report,
            )
            self.loop.run(self._pool.open())

    def begin(self, wanted: Wanted) -> Writing:
        """The servers begin to write the responses."""
        assert self._pool is not None, "serve comes first"
        return Writing(self.loop, self._pool, wanted.prompts, wanted.sampling, lambda: self._wanted)

    def stale(self) -> list[Client]:
        """Servers that are there and wait for the student's weights."""
        return list(self._stale)

    def present(self) -> list[Client]:
        """Servers that can be given weights."""
        if not self.loop.running or self._pool is None or self._router is not None:
            return list(self.clients)
        return [*self._pool.alive(), *self._stale]

    def given(self, clients: Iterable[Client], failed: Mapping[Client, str]) -> None:
        """These have been given weights, but for those that failed, which are lost."""
        for client in clients:
            self._stale.pop(client, None)
            if client not in failed:
                self._refused.discard(client)
                self._deaths[client] = 0  # it came up whole, whatever ends it before it has been asked for anything
        for client, reason in failed.items():
            self._refused.add(client)
            if self._pool is not None and self._router is None:
                self.loop.call(self._pool.lost, client, reason)
            else:
                self._report(f"rollout server {client.url} did not get the student's weights: {reason}")

    def lost(self) -> set[Client]:
        """The servers that were lost since this was last asked."""
        return set() if self._pool is None else self._pool.take_lost()

    def compare(self) -> None:
        """The probe on every server that is there. Raises UserError for one that holds other weights."""

        async def compared() -> None:
            found = await asyncio.gather(*(identify(c, self.expected) for c in self.present()), return_exceptions=True)
            for one in found:
                if isinstance(one, UserError):
                    raise one

        self.loop.run(compared())

    def start_dead_ones(self) -> None:
        """Servers that died since `end_absent_ones` are started, and from now on at once."""
        held, self._held = self._held or [], None
        for client in held:
            self._restart(client)

    def end_absent_ones(self) -> None:
        """Servers that are not there, which may be starting, are ended, and none is started until `start_dead_ones`."""
        self._held = []
        for client in set(self._server_of) - set(self.present()):
            server = self._server_of[client]
            server.stop()
            server.on_exit = partial(self._died, client)
            self._held.append(client)

    def close(self) -> None:
        """Ends the servers that were started here. A second call does nothing."""
        for server in self._started:
            server.on_exit = None
        if self.loop.running:
            self.loop.run(self._close())
            self.loop.__exit__()
        stop_all(self._started)
        self._started, self._server_of, self.clients, self._pool = [], {}, [], None
        self._starter.shutdown(cancel_futures=True)

    # Servers started here

    def _start(self) -> None:
        for server in self._started:
            server.start()
        wait_ready(self._started, limit=60 * self._recipe.servers.start_minutes, report=self._report)

    def _died(self, client: Client, why: str) -> None:
        """From a thread of the server's."""
        self._stale.pop(client, None)
        if self._pool is not None:
            self.loop.call(self._pool.lost, client, why)
        self._deaths[client] += 1
        if self._deaths[client] >= DEATHS:
            self._report(f"rollout server {client.url} died {DEATHS} times in a row and is not started again: it {why}")
        elif self._held is None:
            self._restart(client)
        else:
            self._held.append(client)

    def _restart(self, client: Client) -> None:
        self._starter.submit(self._server_of[client].start)

    # In the event loop

    def _client(self, url: str, ready_path: str = "/ready") -> Client:
        known = next((client for client in self.clients if client.url == url.rstrip("/")), None)
        connections = self._recipe.servers.max_running
        return known or Client(url, api_key=self._key, connections=connections, ready_path=ready_path)

    async def _identify_all(self) -> None:
        """Raises UserError where one is not what it should be, or none is there."""
        await self._arrival.of_all(self.clients, self._identify_first)
        if not self.clients:
            assert self._router is not None
            raise UserError(f"the router {self._router.url} has no servers: start it with --worker-urls")

    async def _identify_first(self, client: Client) -> Limits:
        """Before any update of this run: a server that is paused was left so by a run that was killed in one."""
        try:
            return await identify(client, self.expected)
        except Paused:
            self._report(f"rollout server {client.url} is paused by an update that broke off: it is continued")
            await resume(client)
            return await identify(client, self.expected)

    async def _admit(self, client: Client) -> Limits:
        """What `Pool` asks of each server before it gets work."""
        if client is not self._router:
            return await self._admit_server(client)
        try:
            limits = await admit_workers(client, self._admit_server, self._client)
        except ServerGone:
            if not self._stale:
                raise
        if self._stale:  # the router would send requests to those as well
            raise self._waits("some of its servers wait", *self._stale)
        return limits

    async def _admit_server(self, client: Client) -> Limits:
        try:
            limits = await identify(client, self.expected)
            version = str((await client.model_info()).get("weight_version"))
        except ServerGone:
            self._stale.pop(client, None)
            raise
        except Paused as paused:  # an update may be running: only new weights, which end it, let the server continue
            self._stale[client] = None
            raise self._waits(f"{paused} and waits", client) from None
        if version not in self._wanted:
            self._stale[client] = None
            raise self._waits(f"it has weights '{version}' and waits", client)
        self._stale.pop(client, None)
        self._refused.discard(client)
        self._deaths[client] = 0
        if client in self._server_of:
            self._server_of[client].forget_key_file()
        return limits

    def _waits(self, what: str, *clients: Client) -> Busy:
        """For weights, which come when the main thread has time: it may train. Not so for ever, where they have come
        and could not be taken."""
        why = f"{what} for the student's weights"
        return Busy(why) if self._refused.intersection(clients) else Held(why)

    async def _close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        for client in self.clients:
            await client.close()


def server_settings(recipe: Recipe, student: HfFolder, total_tokens: int, key: str) -> ServerSettings:
    """Of a server that writes the recipe's responses. total_tokens: of a prompt and its response, at the most."""
    chosen = recipe.servers
    return ServerSettings(
        student.path,
        total_tokens + RESERVED_TOKENS + SLACK_TOKENS,
        tensor_parallel=chosen.tensor_parallel,
        precision=recipe.student.precision,
        memory_fraction=chosen.memory_fraction,
        max_running=chosen.max_running,
        api_key=key,
        colocated=chosen.placement == "colocated",
    )
