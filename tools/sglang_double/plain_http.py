"""A small HTTP/1.1 server in an event loop that can stop as abruptly as a killed process."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 503: "Service Unavailable"}


NULL = object()
"""JSON's null; None is an empty answer."""


class Refused(Exception):
    """An answer that is not 200, with the JSON of its body (None: empty)."""

    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, body)
        self.status, self.body, self.headers = status, body, headers or {}


class Died(Exception):
    """The server dies while it serves this request."""


class PlainServer:
    """Sends what `answer` returns: None (empty), NULL, text, bytes without a content type, or a JSON value.

    `answer` may raise Refused, Died or ConnectionError (the connection is reset); any other error becomes a 500, after
    which the connection is reset.
    """

    def __init__(self, port: int = 0) -> None:
        """port: 0 chooses a free one."""
        self.port = port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def answer(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> Any:
        raise NotImplementedError

    async def start(self) -> None:
        """Start serving; after `die`, on the same port."""
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, limit=2**24, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def serving(self) -> bool:
        return self._server is not None

    async def die(self) -> None:
        """Reset every connection and refuse new ones."""
        if self._server is not None:
            server, self._server = self._server, None
            for listening in server.sockets:
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(2):  # asyncio would leak connections that it has just accepted
                await asyncio.sleep(0)
            server.close()
        for task in self._connections - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (request := await _read(reader)) is not None:
                await self._serve(*request, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        except Died:
            await self.die()
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve(
        self, method: str, path: str, headers: dict[str, str], raw: bytes, writer: asyncio.StreamWriter
    ) -> None:
        more: dict[str, str] = {}
        try:
            status, body = 200, await self.answer(method, path, headers, raw)
        except Refused as refused:
            status, body, more = refused.status, refused.body, refused.headers
        except (Died, ConnectionError):
            raise
        except Exception:
            status, body = 500, "Internal Server Error"
        kind = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        if isinstance(body, str):
            kind, body = f"{kind}content-type: text/plain; charset=utf-8\r\n", body.encode()
        elif body is not None and not isinstance(body, bytes):
            kind, body = f"{kind}content-type: application/json\r\n", _json(body)
        raw = body or b""
        head = f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\ncontent-length: {len(raw)}\r\n{kind}\r\n"
        writer.write(head.encode() + raw)
        await writer.drain()
        if status == 500:
            raise ConnectionResetError


def _json(body: Any) -> bytes:
    return json.dumps(None if body is NULL else body, separators=(",", ":")).encode()


async def _read(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str], bytes] | None:
    """Read (method, path, headers, body) of the next request; None at the end of the connection."""
    with suppress(asyncio.IncompleteReadError):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ")
        headers = {name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:-2])}
        return method, target.split("?")[0], headers, await reader.readexactly(int(headers.get("content-length", 0)))
    return None
