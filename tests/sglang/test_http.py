"""HTTP/1.1 as SGLang and its router speak it: where an answer ends, and which connection takes another request."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import ServerGone, SGLangClient, Timeouts

pytestmark = pytest.mark.timeout(60)
JSON = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


class Script:
    """A server that answers each request with the next of some texts. closes: the connection after each of them,
    which it ends or, as a killed one does, resets."""

    def __init__(self, *answers: str, closes: bool = False, resets: bool = False) -> None:
        self.answers, self.closes, self.connections = list(answers), closes or resets, 0
        self.heads: list[str] = []
        self.resets = resets

    async def serve(
        self,
        work: Callable[[SGLangClient], Awaitable[None]],
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", ssl=tls)
        port = server.sockets[0].getsockname()[1]
        scheme = "http" if tls is None else "https"
        client = SGLangClient(f"{scheme}://{host}:{port}", timeouts=Timeouts(health=5, control=5))
        try:
            await work(client)
        finally:
            await client.close()
            server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while not reader.at_eof():
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"Content-Length: 2" in head:
                    await reader.readexactly(2)
                self.heads.append(head.decode())
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            writer.write(self.answers.pop(0).encode())
            await writer.drain()
            if self.closes:
                break
        if self.resets:
            linger = struct.pack("ii", 1, 0)  # the end is then a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()


def has_live_connection(client: SGLangClient) -> bool:
    """Return whether an idle connection is open, as far as the client's event loop has noticed."""
    assert client._session is not None and client._session.connector is not None
    return any(idle.is_connected() for queue in client._session.connector._conns.values() for idle, _ in queue)


def served(script: Script, work: Callable[[SGLangClient], Awaitable[None]]) -> None:
    asyncio.run(script.serve(work))


WHOLE = f'{JSON}Content-Length: 7\r\n\r\n{{"a":1}}'


@pytest.mark.parametrize(
    "answer",
    [WHOLE, f'{JSON}Transfer-Encoding: chunked\r\n\r\n3\r\n{{"a\r\n4;x=y\r\n":1}}\r\n0\r\n\r\n'],
    ids=["length", "chunks"],
)
def test_the_end_of_an_answer_is_missed(answer: str) -> None:
    async def work(client: SGLangClient) -> None:
        for _ in range(3):
            assert await client.model_info() == {"a": 1}

    script = Script(*[answer] * 3)
    served(script, work)
    assert script.connections == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("answer", "resets"),
    [
        (WHOLE, False),
        (WHOLE, True),
        (WHOLE.replace("\r\n", "\r\nConnection: close\r\n", 1), False),
        (f'{JSON}\r\n{{"a":1}}', False),
    ],
    ids=["unannounced", "reset", "announced", "end"],
)
def test_a_connection_that_the_server_closed_is_used_again(answer: str, resets: bool, method: str) -> None:
    async def work(client: SGLangClient) -> None:
        for _ in range(3):
            assert await client.request(method, "/model_info") == {"a": 1}
            while has_live_connection(client):  # until its end arrives
                await asyncio.sleep(0)

    script = Script(*[answer] * 3, closes=True, resets=resets)
    served(script, work)
    assert script.connections == 3


def test_a_connection_that_the_server_is_about_to_close_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    idle_seconds = 0.0

    async def work(client: SGLangClient) -> None:
        nonlocal idle_seconds
        for connections, idle in ((1, 1.5), (1, 4.0), (2, 0.0)):  # the server closes idle ones after 5 s
            await client.model_info()
            assert script.connections == connections and has_live_connection(client)
            idle_seconds += idle

    started = time.monotonic()
    monkeypatch.setattr(aiohttp.connector, "monotonic", lambda: started + idle_seconds)
    script = Script(*[WHOLE] * 3)
    served(script, work)


def test_the_answer_to_a_request_that_was_given_up_answers_the_next_one() -> None:
    async def work(client: SGLangClient) -> None:
        given_up = asyncio.create_task(client.model_info())
        while not script.connections:
            await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.gather(given_up, return_exceptions=True)
        assert await client.model_info() == {"a": 1}

    script = Script(f"{JSON}Content-Length: 99\r\n\r\n", WHOLE)
    served(script, work)
    assert script.connections == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("SSH-2.0-OpenSSH\r\n\r\n", "the answer to /model_info is no HTTP"),
        (f"{JSON}Content-Length: many\r\n\r\n", "the answer to /model_info is no HTTP"),
        (f"{JSON}Content-Length: 99\r\n\r\n{{", r"the connection was dropped \(ClientPayloadError\)"),
    ],
)
def test_half_an_answer_is_taken_for_a_whole_one(answer: str, message: str) -> None:
    async def work(client: SGLangClient) -> None:
        with pytest.raises(ServerGone, match=message):
            await client.model_info()

    served(Script(answer, closes=True), work)


@pytest.mark.parametrize(
    "length", ["Content-Length: 2000000", "Transfer-Encoding: chunked", "X: y"], ids=["length", "chunks", "end"]
)
@pytest.mark.parametrize("status", ["200 OK", "503 Service Unavailable"])
def test_an_answer_without_end_fills_the_memory(status: str, length: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script sends no more than the client may read, and then waits: only a client that refuses ever ends."""

    async def work(client: SGLangClient) -> None:
        with pytest.raises(ServerGone, match="the answer to /model_info is larger than 1048576 bytes"):
            await client.request("GET", "/model_info", attempts=1)
        assert not has_live_connection(client)

    monkeypatch.setattr(SGLangClient, "max_answer_bytes", 2**20)
    start = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    if length == "X: y":
        start += " " * (2**20 + 1)
    elif "chunked" in length:
        start += f"100001\r\n{' ' * (2**20 + 1)}\r\n"
    served(Script(start), work)


@pytest.mark.parametrize("url", ["localhost:30000", "http://", "http://host:port", "ftp://host"])
def test_what_is_no_url_counts_as_a_dead_server(url: str) -> None:
    with pytest.raises(UserError, match=f"{url.rstrip('/')} is no URL of a server"):
        SGLangClient(url)


def test_a_path_or_a_header_is_lost_on_the_way() -> None:
    script = Script(WHOLE)

    async def work(client: SGLangClient) -> None:
        behind = SGLangClient(f"{client.url}/behind/a/path/", api_key="key")
        assert await behind.generate({}) == {"a": 1}
        await behind.close()

    served(script, work)
    request, *headers = script.heads[0].split("\r\n")
    assert request == "POST /behind/a/path/generate HTTP/1.1"
    assert {"Authorization: Bearer key", "Content-Type: application/json", "Content-Length: 2"} <= set(headers)
    assert not any(header.startswith(("Accept-Encoding", "Cookie")) for header in headers)


def test_a_site_s_proxy_gets_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(client: SGLangClient) -> None:
        assert await client.model_info() == {"a": 1}

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    served(Script(WHOLE), work)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_any_certificate_or_none_is_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A site's own authority is trusted where SSL_CERT_FILE names it; without, one line says so at once."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    options = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-nodes", "-days", "1")
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", str(key), "-out", str(certificate), *options)
    subprocess.run(made, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)

    async def work(client: SGLangClient) -> None:
        for _ in range(2):
            assert await client.request("GET", "/info") == {"a": 1}

    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(UserError, match=r"https://localhost:\d+ is not trusted: self.signed.*; SSL_CERT_FILE names"):
        asyncio.run(Script().serve(work, tls, "localhost"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    script = Script(WHOLE, WHOLE)
    asyncio.run(script.serve(work, tls, "localhost"))
    assert script.connections == 1
    with pytest.raises(UserError, match=r"127.0.0.1:\d+ is not trusted: .*mismatch"):
        asyncio.run(Script().serve(work, tls))
