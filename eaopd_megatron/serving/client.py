"""The HTTP client of one server: what it was asked, what it said, and whether it is still there."""

from __future__ import annotations

import asyncio
import json
import os
import random
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.connection import Address, Connection, Response, ServerGone

__all__ = ["Busy", "SGLangClient", "ServerGone", "Timeouts", "read_api_key"]


class Busy(Exception):
    """The server is there and cannot serve this now (HTTP 429 and 5xx)."""


@dataclass(frozen=True)
class Timeouts:
    """Limits on waiting for one server, in seconds."""

    connect: float = 5.0
    health: float = 30.0  # a server that is there says so within this, however much it has to do
    control: float = 60.0  # any request but /generate
    generate: float = 1800.0  # one response, with its time in the server's queue
    attempts: int = 5  # attempts at a request that the server is too busy for
    backoff: float = 0.5  # before the second attempt; it doubles, up to 10 s, and is random up to that


class SGLangClient:
    """One server, or a router in front of several, which has its own `ready_path`.

    An API key goes into the Authorization header alone. Use it from one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connections: int = 64,
        timeouts: Timeouts | None = None,
        ready_path: str = "/ready",
        key_setting: str = "servers.api_key_file",
    ) -> None:
        """connections: /generate requests that run at the same time; control requests are not counted. key_setting: the
        recipe's key that a wrong API key is blamed on.

        Raises UserError for a URL that is none.
        """
        self.url, self.connections, self.ready_path = url.rstrip("/"), connections, ready_path
        self.timeouts = timeouts or Timeouts()
        self._has_key, self._key_setting = api_key is not None, key_setting
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._address = Address(self.url, headers)
        self._idle: list[Connection] = []  # the one used last is at the end

    async def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /generate with a checked body (`wire.Limits.check`). Raises ServerGone, Busy, UserError."""
        answer: dict[str, Any] = await self.request("POST", "/generate", body, seconds=self.timeouts.generate)
        return answer

    async def model_info(self) -> dict[str, Any]:
        """Paths, architecture and the version of the weights that the server has now."""
        found: dict[str, Any] = await self.request("GET", "/model_info")
        return found

    async def server_info(self) -> dict[str, Any]:
        """The server's settings (with its API key among them: never print this)."""
        found: dict[str, Any] = await self.request("GET", "/server_info")
        return found

    async def ready(self) -> bool:
        """Whether it would generate at once; False while it is paused. Raises ServerGone."""
        response = await self._send("GET", self.ready_path, None, self.timeouts.health)
        return response.status == 200

    async def reachable(self) -> bool:
        """Whether anything answers at all, busy or paused. A dropped connection alone does not say so: a server also
        drops the one on which it failed to serve a request."""
        with suppress(ServerGone):
            await self.ready()
            return True
        return False

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        seconds: float | None = None,
        retries: int | None = None,
    ) -> Any:
        """The JSON that the server answers (None for an empty answer).

        retries: attempts, `patience.retries` where it is not given; 1 for what must not be done twice. Raises
        ServerGone at once, Busy after the last attempt, and UserError for what it refuses.
        """
        retries = retries or self.timeouts.attempts
        for attempt in range(retries):
            response = await self._send(method, path, body, seconds or self.timeouts.control)
            try:
                self._check(path, response)
                break
            except Busy:
                if attempt + 1 == retries:
                    raise
                await asyncio.sleep(random.uniform(0, min(10.0, self.timeouts.backoff * 2**attempt)))
        return response.json() if response.headers.get("content-type", "").startswith("application/json") else None

    async def close(self) -> None:
        """Once no request runs."""
        while self._idle:
            self._idle.pop().close()

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> Response:
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        connection = self._connection()
        response = await connection.send(method, path, content, seconds=seconds, connect=self.timeouts.connect)
        self._idle.append(connection)
        return response

    def _connection(self) -> Connection:
        """One that is idle, or a new one. The oldest are looked at last, when all after them are too old already."""
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
            connection.close()
        return Connection(self._address)

    def _check(self, path: str, response: Response) -> None:
        status = response.status
        if status < 400:
            return
        if status in (401, 403):
            what = "refuses the API key" if self._has_key else "asks for an API key"
            raise UserError(f"{self.url} {what}: put the key that it was started with into {self._key_setting}")
        if code := response.headers.get("x-smg-error-code"):  # of a router, about the servers behind it
            raise ServerGone(f"the router says {code}")
        said = f"{self.url}{path} answered {status}: {_message(response)}"
        if status == 429 or status >= 500:
            raise Busy(said)
        raise UserError(said)


def _message(response: Response) -> str:
    """What an error says of itself, in one line."""
    text = response.text
    with suppress(ValueError):
        found = response.json()
        if isinstance(found, dict):
            found = found.get("error", found.get("message", found.get("detail", text)))
            text = str(found.get("message", found) if isinstance(found, dict) else found)
    return " ".join(text.split())[:500]


def read_api_key(path: Path) -> str:
    """The key in a file that its owner alone can read (mode 0600). Raises UserError."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"the API key cannot be read from {path}: {error.strerror}") from None
    if mode & 0o077:
        raise UserError(f"{path} holds an API key and others may read it (mode {mode:04o}): chmod 600 {path}")
    if not key or not key.isprintable() or any(c.isspace() for c in key):
        raise UserError(f"{path} holds no API key: it must be one line without spaces")
    return key
