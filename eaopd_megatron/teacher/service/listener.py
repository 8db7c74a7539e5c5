"""The HTTP side of the service: threads that read requests and send rows, as `teacher/protocol.py` says."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
import socketserver
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

import torch

from eaopd_megatron.errors import UserError
from eaopd_megatron.teacher.protocol import MAX_HEADER_BYTES, ScoreRequest, TeacherInfo


class RequestRefused(Exception):
    """Not now; its text says why, in one line."""


class QueueFull(RequestRefused):
    """Too many requests are here; ask again."""


class ShuttingDown(RequestRefused):
    """Ask another replica."""


class _Work:
    """A request and, once it is there, its answer."""

    def __init__(self, request: ScoreRequest) -> None:
        self.request = request
        self.done = threading.Event()
        self.rows: torch.Tensor | None = None  # none, though done: it was given up


class RequestQueue:
    """Bounded: a request counts from its acceptance until its answer is sent, so memory is bounded too."""

    def __init__(self, places: int, patience: float = 20.0) -> None:
        """places: requests that may be here at the same time. patience: seconds that another one waits for a place."""
        self._places, self._patience = places, patience
        self._held = 0
        self._stopping = False
        self._change = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._unfinished: dict[str, _Work] = {}

    @contextmanager
    def answer(self, request: ScoreRequest) -> Iterator[torch.Tensor]:
        """The rows of a request, once it is scored; leave it when they are sent.

        A request that comes again while it is worked on waits for the same work. Raises Full or Stopping, and
        ValueError for the id of another request.
        """
        self._take_place()
        try:
            work = self._work(request)
            work.done.wait()
            if work.rows is None:
                raise ShuttingDown("the teacher is stopping")
            yield work.rows
        finally:
            with self._change:
                self._held -= 1
                self._change.notify_all()

    def take(self, count: int, seconds: float) -> list[ScoreRequest]:
        """The requests that have waited longest, `count` at the most; none where none came within `seconds`."""
        with self._change:
            self._change.wait_for(lambda: self._waiting, seconds)
            return [self._waiting.popleft().request for _ in range(min(count, len(self._waiting)))]

    def finish(self, requests: Sequence[ScoreRequest], rows: Sequence[torch.Tensor]) -> None:
        """The answers to requests that were taken: [response tokens, bytes] uint8, each."""
        with self._change:
            for request, answer in zip(requests, rows, strict=True):
                work = self._unfinished.pop(request.id)
                work.rows = answer
                work.done.set()

    def stop(self) -> None:
        """No request is accepted any more, and those that no rank has begun are refused."""
        with self._change:
            self._stopping = True
            self._refuse(list(self._waiting))
            self._waiting.clear()
            self._change.notify_all()

    def drain(self, seconds: float) -> bool:
        """Refuses what is still unfinished; whether every answer was sent within `seconds`."""
        with self._change:
            self._refuse(list(self._unfinished.values()))
            return self._change.wait_for(lambda: not self._held, seconds)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def _take_place(self) -> None:
        with self._change:
            free = self._change.wait_for(lambda: self._stopping or self._held < self._places, self._patience)
            if self._stopping:
                raise ShuttingDown("the teacher is stopping")
            if not free:
                raise QueueFull(f"{self._places} requests are here already")
            self._held += 1

    def _work(self, request: ScoreRequest) -> _Work:
        with self._change:
            work = self._unfinished.get(request.id)
            if work is None:
                if self._stopping:
                    raise ShuttingDown("the teacher is stopping")
                work = self._unfinished[request.id] = _Work(request)
                self._waiting.append(work)
                self._change.notify_all()
            elif not work.request.has_same_content(request):
                raise ValueError(f"another request with the id {request.id} is worked on")
            return work

    def _refuse(self, works: Sequence[_Work]) -> None:
        for work in works:
            self._unfinished.pop(work.request.id, None)
            work.done.set()


_SOCKET_TIMEOUT_SECONDS = 300.0
"""What a client has to send a request, or to receive an answer, before it is taken for dead."""


def parse_listen_address(listen: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises UserError."""
    with suppress(ValueError):
        parts = urlsplit(f"//{listen}")
        if parts.hostname and parts.port is not None and parts.netloc == listen and "@" not in listen:
            return parts.hostname, parts.port
    raise UserError(f"teacher.listen is {listen}; it must be HOST:PORT, such as 127.0.0.1:0 (0: a free port)")


def is_loopback(host: str) -> bool:
    """Whether only this host reaches it."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class TeacherHttpServer(socketserver.ThreadingTCPServer):
    """Bound when it is made; serves from `begin` to `end`."""

    daemon_threads = True  # idle connections hold nothing up
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, listen: str, key: str | None) -> None:
        """key: what requests must show; none: nothing. Raises UserError where the address cannot be had, and where it
        is not the loopback's and there is no key."""
        host, port = parse_listen_address(listen)
        if key is None and not is_loopback(host):
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

    @property
    def url(self) -> str:
        """By which clients reach it."""
        host, port = str(self.server_address[0]), self.server_address[1]
        with suppress(ValueError):
            if ipaddress.ip_address(host).is_unspecified:
                host = socket.gethostname()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def begin(self, queue: RequestQueue, info: TeacherInfo) -> None:
        """Requests come into the queue from now on."""
        self.queue, self.info = queue, info
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.1,), name="listener", daemon=True).start()

    def end(self) -> None:
        """No connection is accepted any more."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: TeacherHttpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _SOCKET_TIMEOUT_SECONDS

    def do_GET(self) -> None:
        if not self._allowed():
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
        body = self._body()
        if body is None or not self._allowed():
            return
        if self.path != "/score":
            self._refuse(404, f"there is no {self.path}")
            return
        try:
            request = ScoreRequest.decode(body)
            check_score_request(request, self.server.info)
            with self.server.queue.answer(request) as rows:
                self._head(200, "application/octet-stream", rows.numel())
                if rows.numel():
                    self.wfile.write(rows.numpy().data.cast("B"))
        except ValueError as error:
            self._refuse(400, str(error))
        except RequestRefused as error:
            self._refuse(429 if isinstance(error, QueueFull) else 503, str(error))

    def _body(self) -> bytes | None:
        """None: it is refused already."""
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        longest = 4 + MAX_HEADER_BYTES + 4 * self.server.info.max_tokens
        if not 0 <= length <= longest:
            self.close_connection = True  # what it sends is not read
            self._refuse(400, f"a request needs a Content-Length, of {longest} at the most")
            return None
        body = self.rfile.read(length)
        return body if len(body) == length else None

    def _allowed(self) -> bool:
        key = self.server.key
        given = self.headers.get("Authorization", "").encode("latin-1", errors="replace")
        if key is None or hmac.compare_digest(given, f"Bearer {key}".encode()):
            return True
        self._refuse(401, "the API key is missing or wrong")
        return False

    def _refuse(self, status: int, text: str) -> None:
        self._send_json(status, {"error": " ".join(text.split())[:500]})

    def _send_json(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self._head(status, "application/json", len(text))
        self.wfile.write(text)

    def _head(self, status: int, kind: str, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Not one by one."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing of what a client may have sent."""


def check_score_request(request: ScoreRequest, info: TeacherInfo) -> None:
    """Raises ValueError, in one line, for what would end the ranks."""
    ids, vocab_size = request.token_ids, info.vocab_size
    if len(ids) > info.max_tokens:
        raise ValueError(f"{len(ids)} tokens came; a request has {info.max_tokens} at the most")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(f"a token id is not in the vocabulary of {vocab_size}")
    if any(not -1 <= sample.target_id < vocab_size for sample in request.samples):
        raise ValueError(f"a label is not in the vocabulary of {vocab_size}")
