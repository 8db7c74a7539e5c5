"""One HTTP/1.1 connection to a server, used for one request after the other.

A general HTTP library takes the processor several times as long as everything else that the rollout does for a
request, on the very cores that a server on the same host needs. This is the part of HTTP/1.1 that SGLang and its
router speak: no redirects, no compression, no proxies, no trailers.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from eaopd_megatron.errors import UserError

_KEEP_ALIVE_SECONDS = 2.0
"""Seconds. The server closes a connection that was idle for 5; one used at that moment would look dropped."""
BUFFER = 2**20
"""Bytes of an answer that are taken from the socket ahead of their being read; the head of one is less."""


class ServerGone(Exception):
    """The connection failed or was dropped, or no answer came in time. Its text is one line without the URL."""


@dataclass(frozen=True)
class Response:
    """status, headers (names in lower case) and the body."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", errors="replace")

    def json(self) -> Any:
        """Raises ValueError."""
        return json.loads(self.content)


class Address:
    """Where a URL leads, and what each request to it begins with."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        """headers: sent with every request. Raises UserError for what is no URL of a server."""
        try:
            parts = urlsplit(url)
            self.host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise UserError(f"{url} is no URL of a server: {error}") from None
        if parts.scheme not in ("http", "https") or not self.host:
            raise UserError(f"{url} is no URL of a server: it must be http://HOST:PORT or https://HOST:PORT")
        secure = parts.scheme == "https"
        self.port, self.prefix = port or (443 if secure else 80), parts.path.rstrip("/")
        self.tls: ssl.SSLContext | None = httpx.create_ssl_context() if secure else None
        lines = {"Host": parts.netloc.rpartition("@")[2], **headers}
        self.headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    def untrusted(self, error: ssl.SSLCertVerificationError) -> UserError:
        return UserError(
            f"https://{self.host}:{self.port} is not trusted: {error.verify_message}; SSL_CERT_FILE names the file of "
            "the authority that signed its certificate"
        )

    def request(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self.prefix}{path} HTTP/1.1\r\n{self.headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body


class Connection:
    """Opened by its first request. After one that failed, or was given up, it is closed for good."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used = time.monotonic()

    @property
    def usable(self) -> bool:
        """Whether another request can be sent on it: it is open, and nobody is about to close it."""
        if self._streams is None or time.monotonic() - self._used >= _KEEP_ALIVE_SECONDS:
            return False
        reader, writer = self._streams
        return not reader.at_eof() and not writer.is_closing()

    async def send(self, method: str, path: str, body: bytes, *, seconds: float, connect: float) -> Response:
        """seconds: for the answer to be complete, `connect` of them for the connection. Raises ServerGone, and
        UserError for a certificate that is not trusted."""
        finished = False
        within = min(connect, seconds)
        try:
            async with asyncio.timeout(within):
                reader, writer = self._streams = self._streams or await self._open()
            within = seconds
            async with asyncio.timeout(within):
                writer.write(self._address.request(method, path, body))
                response, finished = await _read(reader)
            self._used = time.monotonic()
            return response
        except TimeoutError:
            raise ServerGone(f"no answer to {path} within {within:g} s") from None
        except (OSError, EOFError) as error:
            raise ServerGone(f"the connection was dropped ({type(error).__name__})") from None
        except (ValueError, asyncio.LimitOverrunError):
            raise ServerGone(f"the answer to {path} is no HTTP") from None
        finally:
            if not finished:
                self.close()

    def close(self) -> None:
        """At once: what is still to be sent or read is lost."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        to = self._address
        try:
            return await asyncio.open_connection(to.host, to.port, ssl=to.tls, limit=BUFFER)
        except ConnectionRefusedError:
            raise ServerGone("the connection is refused") from None
        except ssl.SSLCertVerificationError as error:
            raise to.untrusted(error) from None
        except OSError as error:
            raise ServerGone(f"it cannot be connected to ({error})") from None


async def _read(reader: asyncio.StreamReader) -> tuple[Response, bool]:
    """An answer, and whether the connection can take another request after it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    protocol, status = head[0].split(" ", 2)[:2]
    if not protocol.startswith("HTTP/1."):
        raise ValueError(protocol)
    headers = {}
    for line in head[1:-2]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    keeps = protocol == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    if (length := headers.get("content-length")) is not None:
        content = await reader.readexactly(int(length))
    elif "chunked" in headers.get("transfer-encoding", "").lower():
        content = await _read_chunks(reader)
    elif status in ("204", "304"):
        content = b""
    else:  # it ends with the connection
        content, keeps = await reader.read(), False
    return Response(int(status), headers, content), keeps


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    chunks = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(chunks)
