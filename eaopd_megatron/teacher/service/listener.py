"""The HTTP side of the service: threads that read requests and send payloads (`teacher/protocol.py`)."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
import socketserver
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch

from eaopd_megatron.errors import UserError, one_line
from eaopd_megatron.teacher.protocol import MAX_HEADER_BYTES, ScoreRequest, TeacherInfo

_SOCKET_TIMEOUT_SECONDS = 300.0
"""Seconds without progress in a request or an answer after which the client counts as dead."""
_MAX_STRANGERS = 128
"""Connections that have not shown the key yet. One more ends the oldest of them, so strangers keep no client away."""
_AUTHORIZATION_SECONDS = 20.0
"""Time from the connection to a request's headers, with the key."""
_DISCARD_SECONDS = 2.0
_MAX_HEAD_BYTES = 2**14


class QueueFull(Exception):
    """Too many requests are in progress; the client may ask again."""


class ShuttingDown(Exception):
    """The service stops; the client should ask another replica."""

    def __init__(self) -> None:
        super().__init__("the teacher is stopping")


class _Work:
    """A request and, once `done` is set, its answer."""

    def __init__(self, request: ScoreRequest) -> None:
        self.request = request
        self.done = threading.Event()
        self.payload: torch.Tensor | None = None  # None after `done`: the request was given up


class RequestQueue:
    """Bounded queue: a request counts from its acceptance until its answer is sent, so memory is bounded too."""

    def __init__(self, capacity: int, timeout: float = 20.0) -> None:
        """capacity: requests in progress. timeout: seconds that another one waits for its turn."""
        self._capacity, self._timeout = capacity, timeout
        self._active = 0
        self._stopping = False
        self._change = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._unfinished: dict[str, _Work] = {}

    @contextmanager
    def answer(self, request: ScoreRequest) -> Iterator[torch.Tensor]:
        """Yield the payload of a request once it is scored; leave the context when it is sent.

        A repeated request waits for the work in progress. Raises QueueFull or ShuttingDown, and ValueError if another
        request with this id is in progress.
        """
        with self._change:
            free = self._change.wait_for(lambda: self._stopping or self._active < self._capacity, self._timeout)
            if self._stopping:
                raise ShuttingDown
            if not free:
                raise QueueFull(f"{self._capacity} requests are in progress already")
            work = self._unfinished.get(request.id)
            if work is None:
                work = self._unfinished[request.id] = _Work(request)
                self._waiting.append(work)
                self._change.notify_all()
            elif not work.request.has_same_content(request):
                raise ValueError(f"another request with the id {request.id} is in progress")
            self._active += 1
        try:
            work.done.wait()
            if work.payload is None:
                raise ShuttingDown
            yield work.payload
        finally:
            with self._change:
                self._active -= 1
                self._change.notify_all()

    def take(self, count: int, seconds: float) -> list[ScoreRequest]:
        """Return the oldest waiting requests, at most `count`; an empty list if none came within `seconds`."""
        with self._change:
            self._change.wait_for(lambda: self._waiting, seconds)
            return [self._waiting.popleft().request for _ in range(min(count, len(self._waiting)))]

    def finish(self, requests: Sequence[ScoreRequest], payloads: Sequence[torch.Tensor]) -> None:
        """Answer requests that were taken, each with [response tokens, bytes_per_token] uint8."""
        with self._change:
            for request, payload in zip(requests, payloads, strict=True):
                work = self._unfinished.pop(request.id)
                work.payload = payload
                work.done.set()

    def stop(self) -> None:
        """Accept no more requests, and refuse those that no rank has taken."""
        with self._change:
            self._stopping = True
            self._refuse(list(self._waiting))
            self._waiting.clear()
            self._change.notify_all()

    def drain(self, seconds: float) -> bool:
        """Refuse all unfinished requests; return whether every answer was sent within `seconds`."""
        with self._change:
            self._refuse(list(self._unfinished.values()))
            return self._change.wait_for(lambda: not self._active, seconds)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def _refuse(self, works: Sequence[_Work]) -> None:
        for work in works:
            self._unfinished.pop(work.request.id, None)
            work.done.set()


def parse_listen_address(listen: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT. Raises UserError."""
    with suppress(ValueError):
        parts = urlsplit(f"//{listen}")
        if parts.hostname and parts.port is not None and parts.netloc == listen and "@" not in listen:
            return parts.hostname, parts.port
    raise UserError(f"teacher.listen is {listen}; it must be HOST:PORT, such as 127.0.0.1:0 (0: a free port)")


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class TeacherHttpServer(socketserver.ThreadingTCPServer):
    """HTTP server of a teacher. It binds when it is created, and serves from `start` to `stop`."""

    daemon_threads = True  # idle connections do not delay the exit
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, listen: str, key: str | None) -> None:
        """key: the API key that requests must have; None: none needed. Raises UserError if the address is taken, and if
        other hosts can reach it and there is no key."""
        host, port = parse_listen_address(listen)
        if key is None and not _is_loopback(host):
            raise UserError(
                f"teacher.listen is {listen}, which other hosts reach: give a key with teacher.api_key_file (a file of "
                "mode 0600 with one line)"
            )
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler, bind_and_activate=False)
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise UserError(f"teacher.listen: {listen} cannot be listened on: {error.strerror or error}") from None
        self.key = key
        self.queue: RequestQueue
        self.info: TeacherInfo
        self._strangers: dict[socket.socket, float] = {}  # time of the connection, oldest first
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        with suppress(ValueError):
            if ipaddress.ip_address(host).is_unspecified:
                host = socket.gethostname()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self, queue: RequestQueue, info: TeacherInfo) -> None:
        """Put requests into the queue from now on."""
        self.queue, self.info = queue, info
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="listener", daemon=True).start()

    def stop(self) -> None:
        """Accept no more connections."""
        self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread; it counts as a stranger's until `admit`."""
        with self._lock:
            self._strangers[request] = time.monotonic()
            surplus = len(self._strangers) > _MAX_STRANGERS
        if surplus:
            self._end_oldest_stranger(0)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """End strangers that take too long. Called several times a second."""
        while self._end_oldest_stranger(_AUTHORIZATION_SECONDS):
            pass

    def shutdown_request(self, request: Any) -> None:
        self.admit(request)
        super().shutdown_request(request)

    def admit(self, connection: socket.socket) -> None:
        """Count a connection no longer as a stranger's."""
        with self._lock:
            self._strangers.pop(connection, None)

    def _end_oldest_stranger(self, seconds: float) -> bool:
        """End the oldest stranger's connection if it is older than this; return whether one was ended."""
        with self._lock:
            oldest = next(iter(self._strangers), None)
            if oldest is None or time.monotonic() - self._strangers[oldest] < seconds:
                return False
            del self._strangers[oldest]
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread reads the end and closes it
        return True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore client disconnects."""


class _BoundedHead:
    """A connection's stream whose lines, of a request's head, have at most `left` bytes together."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.left = stream, _MAX_HEAD_BYTES
        self.read, self.close = stream.read, stream.close

    @property
    def closed(self) -> bool:
        return self._stream.closed

    def readline(self, limit: int = -1) -> bytes:
        line = self._stream.readline(self.left + 1 if limit < 0 else min(limit, self.left + 1))
        self.left -= len(line)
        if self.left < 0:
            raise ConnectionError("the head of a request is too long")
        return line


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: TeacherHttpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _SOCKET_TIMEOUT_SECONDS

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = _BoundedHead(self.rfile)

    def handle_one_request(self) -> None:
        self.rfile.left = _MAX_HEAD_BYTES
        super().handle_one_request()

    def do_GET(self) -> None:
        if not self._authorized():
            return
        if self.path == "/info":
            self._send_json(200, self.server.info.to_json())
        elif self.path != "/ready":
            self._refuse(404, f"there is no {self.path}")
        elif self.server.queue.stopping:
            self._refuse(503, "the teacher is stopping")
        else:
            self._send_json(200, {})

    def do_POST(self) -> None:
        if not self._authorized():
            return
        body = self._read_body()
        if body is None:
            return
        if self.path != "/score":
            self._refuse(404, f"there is no {self.path}")
            return
        try:
            request = ScoreRequest.decode(body)
            check_score_request(request, self.server.info)
            with self.server.queue.answer(request) as payload:
                self._send_head(200, "application/octet-stream", payload.numel())
                if payload.numel():
                    self.wfile.write(payload.numpy().data.cast("B"))
        except ValueError as error:
            self._refuse(400, str(error))
        except QueueFull as error:
            self._refuse(429, str(error))
        except ShuttingDown as error:
            self._refuse(503, str(error))

    def _read_body(self) -> bytes | None:
        """Return the body, or None after refusing the request."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        max_length = 4 + MAX_HEADER_BYTES + 4 * self.server.info.max_tokens
        if not 0 <= length <= max_length:
            self.close_connection = True  # the body is not read
            self._refuse(400, f"a request needs a Content-Length of at most {max_length}")
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def _authorized(self) -> bool:
        key = self.server.key
        header = self.headers.get("Authorization", "").encode("latin-1", errors="replace")
        if key is None or hmac.compare_digest(header, f"Bearer {key}".encode()):
            self.server.admit(self.connection)
            return True
        self.close_connection = True  # its body is not read
        self._refuse(401, "the API key is missing or wrong")
        self._discard_input()
        return False

    def _discard_input(self) -> None:
        """Drop what a refused client still sends: closing the connection at once would reset it, and it would not read
        the refusal."""
        deadline = time.monotonic() + _DISCARD_SECONDS
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(2**16):
                    return

    def _refuse(self, status: int, text: str) -> None:
        self._send_json(status, {"error": one_line(text)[:500]})

    def _send_json(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self._send_head(status, "application/json", len(text))
        self.wfile.write(text)

    def _send_head(self, status: int, content_type: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Log no requests, and nothing that a client may have sent."""


def check_score_request(request: ScoreRequest, info: TeacherInfo) -> None:
    """Raise ValueError, in one line, for a request that would crash the ranks."""
    ids, vocab_size = request.token_ids, info.vocab_size
    if len(ids) > info.max_tokens:
        raise ValueError(f"{len(ids)} tokens came; a request has at most {info.max_tokens}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"a token id is not in the vocabulary of {vocab_size}")
    if any(not -1 <= sample.target_id < vocab_size for sample in request.samples):
        raise ValueError(f"a target id is not in the vocabulary of {vocab_size}")
