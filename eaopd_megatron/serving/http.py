"""The HTTP client of one server, with one retry policy, and the event loop in a thread that clients run in."""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import stat
import threading
from collections.abc import Callable, Coroutine, Generator, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import yarl

from eaopd_megatron.errors import UserError, one_line

T = TypeVar("T")
_Json = dict[str, Any]
FUTURE_POLL_SECONDS = 0.2
"""How long a rank waits for background work before it looks for other events."""
_KEEP_ALIVE_SECONDS = 2.0  # SGLang closes connections after 5 idle seconds; a request at that moment looks dropped
_READ_BUFFER_BYTES = 2**20
_MAX_ERROR_BYTES = 2**20
_MAX_BACKOFF_SECONDS = 10.0


class ServerGone(Exception):
    """The connection failed or was dropped, or no answer came in time. The message is one line without the URL."""


class Busy(Exception):
    """The server answers but cannot serve this request now (HTTP 429 or 5xx)."""


@dataclass(frozen=True)
class Timeouts:
    """Time limits (seconds) and retry policy for the requests to one server."""

    connect: float = 5.0
    health: float = 30.0  # GET /ready: any live server answers within this, whatever its load
    control: float = 60.0  # any request but /generate and /score
    generate: float = 1800.0  # one response, including the time in the server's queue
    attempts: int = 5  # at a request that the server is too busy for
    backoff: float = 0.5  # first retry after a random time of at most this; doubles each time, up to 10 s


class HttpResponse(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content: bytes | bytearray


class HttpClient:
    """Client of one server, for one event loop. The API key appears in no message; proxies are not used; certificates
    are verified against the system's authorities or those in SSL_CERT_FILE."""

    key_setting = "servers.api_key_file"  # named in messages about a wrong API key
    # of an answer whose size the caller does not know: 32k tokens with 750 log-probs are 2**30
    max_answer_bytes = 2**31

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connections: int = 64,
        timeouts: Timeouts | None = None,
        ready_path: str = "/ready",
        key_setting: str | None = None,
    ) -> None:
        """connections: concurrent calls of a pool; not enforced here. ready_path: answers 200 when the server is ready.
        Raises UserError for an invalid URL."""
        self.url, self.connections, self.ready_path = url.rstrip("/"), connections, ready_path
        self.timeouts = timeouts or Timeouts()
        self._base, self._secure = _parse_url(self.url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.key_setting = key_setting or self.key_setting
        self._session: aiohttp.ClientSession | None = None

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        seconds: float | None = None,
        attempts: int | None = None,
    ) -> Any:
        """Return the JSON answer; None if it is not JSON.

        seconds: limit on one attempt, `timeouts.control` by default. attempts: `timeouts.attempts` by default, 1 for
        what must not be repeated. Raises ServerGone at once, Busy after the last attempt, UserError for a refusal.
        """
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        response = await self.fetch(method, path, content, seconds=seconds, attempts=attempts)
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return json.loads(response.content) if is_json else None

    async def ready(self) -> bool:
        """Return whether the server works on requests now (False while it loads or is paused). Raises ServerGone."""
        response = await self._send("GET", self.ready_path, b"", self.timeouts.health)
        return response.status == 200

    async def reachable(self) -> bool:
        """Return whether the server answers at all, even busy or paused. (A server that failed one request drops its
        connection.)"""
        with suppress(ServerGone):
            await self.ready()
            return True
        return False

    async def fetch(
        self,
        method: str,
        path: str,
        content: bytes,
        *,
        seconds: float | None = None,
        attempts: int | None = None,
        size: int | None = None,
    ) -> HttpResponse:
        """Return a successful answer.

        size: bytes of a large answer, read into a bytearray without another copy. Other arguments and errors as in
        `request`; UserError also for an answer of another size. No answer of a wrong or excessive size is read.
        """
        limit, attempts = seconds or self.timeouts.control, attempts or self.timeouts.attempts
        for attempt in range(attempts):  # by hand: tenacity would cost half as much processor time as the request
            try:
                response = await self._send(method, path, content, limit, size)
                if response.status >= 400:
                    raise self._error(path, response)
                return response
            except Busy:
                if attempt + 1 == attempts:
                    raise
            await asyncio.sleep(random.uniform(0, min(_MAX_BACKOFF_SECONDS, self.timeouts.backoff * 2**attempt)))
        raise ValueError(f"attempts is {attempts}")

    async def close(self) -> None:
        """Close all connections. No request may be running."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _send(
        self, method: str, path: str, content: bytes, seconds: float, size: int | None = None
    ) -> HttpResponse:
        if self._session is None:
            self._session = _new_session(self._headers, self._secure)
        connect = min(self.timeouts.connect, seconds)
        try:
            async with self._session.request(
                method,
                _url(self._base + path),
                data=aiohttp.BytesPayload(content) if content else None,  # of bytes it would look for the payload class
                timeout=_client_timeout(seconds, connect),
                allow_redirects=False,
            ) as response:
                return HttpResponse(response.status, response.headers, await self._read(path, response, size))
        except aiohttp.ConnectionTimeoutError:
            raise ServerGone(f"no answer to {path} within {connect:g} s") from None
        except TimeoutError:
            raise ServerGone(f"no answer to {path} within {seconds:g} s") from None
        except aiohttp.ClientConnectorError as error:
            untrusted = getattr(error, "certificate_error", None)
            if isinstance(untrusted, ssl.SSLCertVerificationError):
                raise UserError(
                    f"https://{error.host}:{error.port} is not trusted: {untrusted.verify_message}; SSL_CERT_FILE "
                    "names the file of the authority that signed its certificate"
                ) from None
            if isinstance(error.os_error, ConnectionRefusedError):
                raise ServerGone("the connection is refused") from None
            raise ServerGone(f"it cannot be connected to ({error.os_error})") from None
        except aiohttp.ClientResponseError:
            raise ServerGone(f"the answer to {path} is no HTTP") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"the connection was dropped ({type(error).__name__})") from None

    async def _read(self, path: str, response: aiohttp.ClientResponse, size: int | None) -> bytes | bytearray:
        """Return the body, of `size` bytes or at most max_answer_bytes. (Leaving the rest unread drops the
        connection.)"""
        length, failed = response.content_length, response.status >= 400
        if size is not None and not failed:
            if length is None:
                raise ServerGone(f"the answer to {path} does not say how long it is")
            if length != size:
                raise UserError(f"{self.url}{path} answered {length} bytes, and not {size}: it is another service")
            content, used = bytearray(size), 0
            async for chunk in response.content.iter_any():
                content[used : used + len(chunk)] = chunk
                used += len(chunk)
            return content
        limit = _MAX_ERROR_BYTES if failed else self.max_answer_bytes
        if length is not None and length <= limit:
            return await response.read()
        content = bytearray()
        if length is None:  # chunked, or up to the connection's end
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > limit:
                    break
            else:
                return content
        raise ServerGone(f"the answer to {path} is larger than {limit} bytes")

    def _error(self, path: str, response: HttpResponse) -> Exception:
        if response.status in (401, 403):
            what = "refuses the API key" if "Authorization" in self._headers else "asks for an API key"
            return UserError(f"{self.url} {what}: put the key that it was started with into {self.key_setting}")
        if code := response.headers.get("x-smg-error-code"):  # from sglang-router, about the servers behind it
            return ServerGone(f"the router says {code}")
        message = f"{self.url}{path} answered {response.status}: {_error_text(response.content)}"
        return Busy(message) if response.status == 429 or response.status >= 500 else UserError(message)


class SGLangClient(HttpClient):
    """Client of one SGLang server, or of a router in front of several."""

    async def generate(self, body: Mapping[str, Any]) -> _Json:
        """POST /generate with a validated body (`LengthLimits.validate`). Raises ServerGone, Busy, UserError."""
        return cast(_Json, await self.request("POST", "/generate", body, seconds=self.timeouts.generate))

    async def model_info(self) -> _Json:
        """Return the model's path and architecture and the current version of its weights."""
        return cast(_Json, await self.request("GET", "/model_info"))

    async def server_info(self) -> _Json:
        """Return the server's settings. They include its API key: never print them."""
        return cast(_Json, await self.request("GET", "/server_info"))


def _parse_url(url: str) -> tuple[str, bool]:
    """Return the URL without credentials, and whether it is https."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise UserError(f"{url} is no URL of a server: {error}") from None
    if not valid:
        raise UserError(f"{url} is no URL of a server: it must be http://HOST:PORT or https://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", parts.scheme == "https"


@lru_cache(maxsize=64)
def _url(text: str) -> yarl.URL:
    return yarl.URL(text, encoded=True)


@lru_cache(maxsize=64)
def _client_timeout(seconds: float, connect: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds, connect=connect)  # of the name's address, too


def _new_session(headers: Mapping[str, str], secure: bool) -> aiohttp.ClientSession:
    tls = ssl.create_default_context() if secure else True
    return aiohttp.ClientSession(  # limit: pools limit the number of running requests
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS, ssl=tls),
        headers=headers,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=_READ_BUFFER_BYTES,
    )


def _error_text(content: bytes | bytearray) -> str:
    """Return the message of an error answer in one line."""
    text = content.decode("utf-8", errors="replace")
    with suppress(ValueError):
        answer = json.loads(content)
        if isinstance(answer, dict):
            error = answer.get("error", answer.get("message", answer.get("detail", text)))
            text = str(error.get("message", error) if isinstance(error, dict) else error)
    return one_line(text)[:500]


def server_is_ready(url: str, api_key: str | None = None) -> bool:
    """Return whether GET /ready answers 200 within 5 s. Blocks, so not for threads with an event loop."""

    async def check() -> bool:
        client = HttpClient(url, api_key=api_key, timeouts=Timeouts(connect=5.0, health=5.0))
        try:
            return await client.ready()
        except ServerGone:
            return False
        finally:
            await client.close()

    return asyncio.run(check())


def read_api_key(path: Path) -> str:
    """Return the API key in a file that only its owner can read (mode 0600). Raises UserError."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        key = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise UserError(f"the API key cannot be read from {path}: {error.strerror}") from None
    if mode & 0o077:
        raise UserError(f"{path} holds an API key and others may read it (mode {mode:04o}): chmod 600 {path}")
    if not key or not key.isprintable() or any(c.isspace() for c in key):
        raise UserError(f"{path} holds no API key: it must be one line without spaces")
    return key


class EventLoopThread:
    """An event loop in a thread of its own. A context manager."""

    def __init__(self, name: str = "rollout") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.submit(work).result()

    def call_soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop without waiting for it."""
        self._loop.call_soon_threadsafe(function, *arguments)


def poll_until_done(future: Future[T]) -> Generator[None, None, T]:
    """Yield every FUTURE_POLL_SECONDS until the future is done; return its result."""
    while not wait([future], FUTURE_POLL_SECONDS).done:
        yield None
    return future.result()
