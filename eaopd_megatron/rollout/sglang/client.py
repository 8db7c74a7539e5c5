"""The HTTP client of one server: what it was asked, what it said, and whether it is still there."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from eaopd_megatron.errors import UserError


class ServerGone(Exception):
    """The connection failed or was dropped, or no answer came in time. Its text is one line without the URL."""


class Busy(Exception):
    """The server is there and cannot serve this now (HTTP 429 and 5xx)."""


@dataclass(frozen=True)
class Patience:
    """Limits on waiting for one server, in seconds."""

    connect: float = 5.0
    silence: float = 30.0  # a server that is there says so within this, however much it has to do
    control: float = 60.0  # any request but /generate
    generate: float = 1800.0  # one response, with its time in the server's queue
    retries: int = 5  # attempts at a request that the server is too busy for
    backoff: float = 0.5  # before the second attempt; it doubles, up to 10 s, and is random up to that


class Client:
    """One server, or a router in front of several, which has its own `ready_path`.

    An API key goes into the Authorization header alone. Use it from one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connections: int = 64,
        patience: Patience | None = None,
        ready_path: str = "/ready",
    ) -> None:
        """connections: /generate requests that run at the same time; control requests are not counted."""
        self.url, self.connections, self.ready_path = url.rstrip("/"), connections, ready_path
        self.patience = patience or Patience()
        self._has_key = api_key is not None
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._tls = httpx.create_ssl_context(trust_env=False)
        # One httpx client a connection, the last used first: a client looks through all of its connections at every
        # request, which with 64 of them takes the processor longer than everything else.
        self._idle: list[httpx.AsyncClient] = []

    async def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /generate with a checked body (`wire.Limits.check`). Raises ServerGone, Busy, UserError."""
        answer: dict[str, Any] = await self.call("POST", "/generate", body, seconds=self.patience.generate)
        return answer

    async def model_info(self) -> dict[str, Any]:
        """Paths, architecture and the version of the weights that the server has now."""
        found: dict[str, Any] = await self.call("GET", "/model_info")
        return found

    async def server_info(self) -> dict[str, Any]:
        """The server's settings (with its API key among them: never print this)."""
        found: dict[str, Any] = await self.call("GET", "/server_info")
        return found

    async def ready(self) -> bool:
        """Whether it would generate at once; False while it is paused. Raises ServerGone."""
        response = await self._send("GET", self.ready_path, None, self.patience.silence)
        return response.status_code == 200

    async def there(self) -> bool:
        """Whether anything answers at all, busy or paused. A dropped connection alone does not say so: a server also
        drops the one on which it failed to serve a request."""
        with suppress(ServerGone):
            await self.ready()
            return True
        return False

    async def call(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, seconds: float | None = None
    ) -> Any:
        """The JSON that the server answers (None for an empty answer).

        Raises ServerGone at once, Busy after `patience.retries` attempts, and UserError for what it refuses.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Busy),
            stop=stop_after_attempt(self.patience.retries),
            wait=wait_random_exponential(multiplier=self.patience.backoff, max=10.0),
            sleep=asyncio.sleep,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                response = await self._send(method, path, body, seconds or self.patience.control)
                self._check(path, response)
        return response.json() if response.headers.get("content-type", "").startswith("application/json") else None

    async def close(self) -> None:
        """Once no request runs."""
        while self._idle:
            await self._idle.pop().aclose()

    def _connection(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url,
            headers=self._headers,
            # the server closes a connection that was idle for 5 s; one that is used at that moment would look dropped
            limits=httpx.Limits(keepalive_expiry=2.0),
            verify=self._tls,
            trust_env=False,  # no proxy between the trainer and its servers
        )

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=min(self.patience.connect, seconds), pool=None)
        content = None if body is None else json.dumps(body, separators=(",", ":"))
        http = self._idle.pop() if self._idle else self._connection()
        try:
            return await http.request(method, path, content=content, timeout=timeout)
        except httpx.ConnectError:
            raise ServerGone("the connection is refused") from None
        except httpx.TimeoutException as error:
            within = self.patience.connect if isinstance(error, httpx.ConnectTimeout) else seconds
            raise ServerGone(f"no answer to {path} within {within:g} s") from None
        except httpx.TransportError as error:
            raise ServerGone(f"the connection was dropped ({type(error).__name__})") from None
        except httpx.InvalidURL as error:
            raise UserError(f"{self.url} is no URL of a server: {error}") from None
        finally:
            self._idle.append(http)

    def _check(self, path: str, response: httpx.Response) -> None:
        status = response.status_code
        if status < 400:
            return
        if status in (401, 403):
            what = "refuses the API key" if self._has_key else "asks for an API key"
            raise UserError(f"{self.url} {what}: put the key that it was started with into servers.api_key_file")
        if code := response.headers.get("x-smg-error-code"):  # of a router, about the servers behind it
            raise ServerGone(f"the router says {code}")
        said = f"{self.url}{path} answered {status}: {_message(response)}"
        if status == 429 or status >= 500:
            raise Busy(said)
        raise UserError(said)


def _message(response: httpx.Response) -> str:
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
