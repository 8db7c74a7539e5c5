"""The HTTP client of one separate teacher: what it answers goes from the socket straight into a tensor.

A request of a micro-batch is answered with tens of megabytes, which an event loop would copy several times. So each
runs in a thread of its own, which blocks on its connection; closing that ends the wait.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.client import Busy, Timeouts
from eaopd_megatron.serving.connection import _KEEP_ALIVE_SECONDS, Address, ServerGone
from eaopd_megatron.teacher.protocol import TeacherInfo

_CONTROL_THREADS = 2
"""For the questions whether a server is there, while all other threads wait for its answers."""
_PIECE = 2**23
"""Bytes that are read between two looks at the clock."""
_LONGEST_TEXT = 2**20
"""Bytes of an answer that is no tensor, at the most."""


class TeacherClient:
    """One replica. Use it from one event loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        connections: int = 8,
        timeouts: Timeouts | None = None,
        key_setting: str = "teacher.api_key_file",
    ) -> None:
        """connections: requests for scores that run at the same time. key_name: the recipe's key of the file with the
        API key, for messages. Raises UserError for a URL that is none."""
        self.url, self.connections = url.rstrip("/"), connections
        self.timeouts = timeouts or Timeouts()
        self._key_name, self._address = key_setting, Address(self.url, {})
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._threads = ThreadPoolExecutor(connections + _CONTROL_THREADS, thread_name_prefix="teacher")
        self._idle: list[_Wire] = []  # the one used last is at the end

    async def score(self, body: bytes, size: int) -> torch.Tensor:
        """POST /score → the answer's `size` bytes [size] uint8.

        Raises ServerGone at once, Busy after `patience.retries` attempts, and UserError for what it refuses, or where
        it answers another number of bytes.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Busy),
            stop=stop_after_attempt(self.timeouts.attempts),
            wait=wait_random_exponential(multiplier=self.timeouts.backoff, max=10.0),
            reraise=True,
        )
        answer: torch.Tensor = await retrying(self._ask, "POST", "/score", self.timeouts.generate, body, size)
        if len(answer) != size:
            raise UserError(f"{self.url}/score answered {len(answer)} bytes, and not {size}: it is another teacher")
        return answer

    async def info(self) -> TeacherInfo:
        """What this teacher is. Raises as `score`, and UserError for what is no teacher of this version."""
        said = await self._ask("GET", "/info", self.timeouts.control)
        try:
            return TeacherInfo.from_json(json.loads(said.numpy().tobytes()))
        except ValueError as error:
            raise UserError(
                f"{self.url} cannot be used: {error}; start it with `eaopd teach` of this version"
            ) from None

    async def ready(self) -> bool:
        """Whether it scores. Raises ServerGone, UserError."""
        with suppress(Busy):
            await self._ask("GET", "/ready", self.timeouts.health)
            return True
        return False

    async def reachable(self) -> bool:
        """Whether anything answers at all."""
        with suppress(ServerGone):
            await self.ready()
            return True
        return False

    async def close(self) -> None:
        """Once no request runs."""
        while self._idle:
            self._idle.pop().close()
        self._threads.shutdown(wait=False)

    async def _ask(
        self, method: str, path: str, seconds: float, body: bytes | None = None, size: int = 0
    ) -> torch.Tensor:
        wire, most = self._wire(), max(size, _LONGEST_TEXT)

        def exchange() -> tuple[int, torch.Tensor]:
            return wire.exchange(method, path, body, self._headers, most, seconds)

        try:
            status, answer = await asyncio.get_running_loop().run_in_executor(self._threads, exchange)
        except BaseException:  # cancelled: the thread's wait ends with its connection
            wire.close()
            raise
        if wire.usable:
            self._idle.append(wire)
        if status >= 400:
            self._refuse(path, status, answer)
        return answer

    def _wire(self) -> _Wire:
        """One that is idle, or a new one."""
        while self._idle:
            if (wire := self._idle.pop()).usable:
                return wire
            wire.close()
        return _Wire(self._address, self.timeouts.connect)

    def _refuse(self, path: str, status: int, answer: torch.Tensor) -> None:
        text = answer.numpy().tobytes().decode("utf-8", errors="replace")
        with suppress(ValueError, KeyError, TypeError):
            text = str(json.loads(text)["error"])
        if status in (401, 403):
            what = "refuses the API key" if self._headers else "asks for an API key"
            raise UserError(f"{self.url} {what}: put the key that it was started with into {self._key_name}")
        said = f"{self.url}{path} answered {status}: {' '.join(text.split())[:500]}"
        raise Busy(said) if status == 429 or status >= 500 else UserError(said)


class _Wire:
    """A connection, used for one request after the other. `close` may come from another thread than `exchange`."""

    def __init__(self, address: Address, connect: float) -> None:
        """connect: seconds that it may take to be opened."""
        self._address, self._connect = address, connect
        self._http = (
            http.client.HTTPConnection(address.host, address.port, timeout=connect)
            if address.tls is None
            else http.client.HTTPSConnection(address.host, address.port, timeout=connect, context=address.tls)
        )
        self._socket: socket.socket | None = None
        self._busy, self._closed, self._used = False, False, time.monotonic()

    @property
    def usable(self) -> bool:
        """Whether another request can be sent on it: it is open, and nobody is about to close it."""
        return not self._closed and time.monotonic() - self._used < _KEEP_ALIVE_SECONDS

    def exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], most: int, seconds: float
    ) -> tuple[int, torch.Tensor]:
        """Status and body [bytes] uint8. most: bytes of a body that is read. seconds: for the answer to be complete.
        Raises ServerGone, and UserError for a certificate that is not trusted."""
        self._busy = True
        try:
            deadline = _Deadline(self._open(), seconds)
            self._http.request(method, self._address.prefix + path, body, headers)
            answer = self._http.getresponse()
            tensor = _read(answer, most, deadline)
            self._closed, self._used = self._closed or answer.will_close, time.monotonic()
            return answer.status, tensor
        except TimeoutError:
            raise ServerGone(f"no answer to {path} within {seconds:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise self._address.untrusted(error) from None
        except OSError as error:
            raise ServerGone(f"the connection was dropped ({type(error).__name__})") from None
        except http.client.HTTPException as error:
            raise ServerGone(f"the answer to {path} is no HTTP, or ended early ({type(error).__name__})") from None
        finally:
            self._busy = False
            if self._closed:
                self._http.close()

    def close(self) -> None:
        """At once: what is still to be sent or read is lost."""
        self._closed = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        if not self._busy:
            self._http.close()

    def _open(self) -> socket.socket:
        if self._socket is None:
            try:
                self._http.connect()
            except ConnectionRefusedError:
                raise ServerGone("the connection is refused") from None
            except OSError as error:
                raise ServerGone(f"it cannot be connected to ({error})") from None
            self._socket = self._http.sock
        if self._closed or self._socket is None:
            raise ConnectionAbortedError
        return self._socket


class _Deadline:
    """Of a whole exchange; a socket's own limit is that of one wait."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._socket, self._end = connection, time.monotonic() + seconds
        self.renew()

    def renew(self) -> None:
        """The next wait is no longer than what is left. Raises TimeoutError."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


def _read(answer: http.client.HTTPResponse, most: int, deadline: _Deadline) -> torch.Tensor:
    if answer.length is None or answer.length > most:  # chunked, or of somebody else
        raise http.client.UnknownTransferEncoding
    tensor = torch.empty(answer.length, dtype=torch.uint8)
    left = tensor.numpy().data
    while left:
        deadline.renew()
        if not (count := answer.readinto(left[:_PIECE])):
            raise http.client.IncompleteRead(b"")
        left = left[count:]
    return tensor
