"""The HTTP side of a teacher's service; the test decides when a request is scored."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from eaopd_megatron.errors import UserError
from eaopd_megatron.teacher.protocol import ScoredSample, ScoreRequest, TeacherInfo
from eaopd_megatron.teacher.service import listener
from eaopd_megatron.teacher.service.listener import RequestQueue, TeacherHttpServer, parse_listen_address

KEY = "a-key"
INFO = TeacherInfo(
    model="m",
    fingerprint="f",
    signal="hidden",
    top_k=16,
    width=4,
    dtype="fp32",
    vocab_size=100,
    terminal=("none", -1, -1),
    max_tokens=32,
    layout="l",
)
pytestmark = pytest.mark.timeout(60)


class Service:
    """A service that scores one request per call of `score`: numbered fp32 rows."""

    def __init__(self, key: str | None = KEY, capacity: int = 2, timeout: float = 0.0) -> None:
        self.queue, self.key = RequestQueue(capacity, timeout), key
        self.listener = TeacherHttpServer("127.0.0.1:0", key)
        self.listener.start(self.queue, INFO)
        self.scored: list[ScoreRequest] = []

    def close(self) -> None:
        self.queue.stop()
        assert self.queue.drain(10)
        self.listener.stop()

    def take(self) -> ScoreRequest:
        (request,) = self.queue.take(1, 30)
        return request

    def score(self) -> None:
        request = self.take()
        self.scored.append(request)
        self.queue.finish([request], [rows_of(request)])

    def wait_for(self, requests: int) -> None:
        """Wait until this many requests are in progress."""
        while self.queue._active != requests:
            time.sleep(0.002)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.listener.server_address[:2], timeout=30)  # type: ignore[arg-type]

    def request(self, method: str, path: str, body: bytes | None = None, key: str | None = KEY) -> tuple[int, bytes]:
        connection = self.connect()
        connection.request(method, path, body, {} if key is None else {"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        return answer.status, answer.read()

    def send(self, *requests: ScoreRequest) -> PendingAnswers:
        return PendingAnswers(self, requests)


class PendingAnswers:
    """Requests that wait for their answers, each on its own connection."""

    def __init__(self, service: Service, requests: Sequence[ScoreRequest]) -> None:
        self.answers: list[tuple[int, bytes]] = [(0, b"")] * len(requests)

        def send(i: int, body: bytes) -> None:
            self.answers[i] = service.request("POST", "/score", body)

        self.threads = [threading.Thread(target=send, args=(i, r.encode())) for i, r in enumerate(requests)]
        for thread in self.threads:
            thread.start()

    def wait(self) -> list[tuple[int, bytes]]:
        for thread in self.threads:
            thread.join(30)
        return self.answers


@pytest.fixture
def service() -> Iterator[Service]:
    one = Service()
    yield one
    one.close()


def request(name: str = "a", tokens: int = 5) -> ScoreRequest:
    return ScoreRequest(name, [ScoredSample(2, tokens - 2)], torch.arange(tokens, dtype=torch.int32))


def rows_of(one: ScoreRequest) -> torch.Tensor:
    found = torch.arange(4 * one.response_tokens, dtype=torch.float32) + len(one.token_ids)
    return found.view(torch.uint8).view(one.response_tokens, 16)


def body_of(one: ScoreRequest) -> bytes:
    return rows_of(one).numpy().tobytes()


def error(answer: tuple[int, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[1])["error"]


def test_rows_come_back_as_other_bytes(service: Service) -> None:
    pending = service.send(request())
    service.score()
    assert pending.wait() == [(200, body_of(request()))]
    assert TeacherInfo.from_json(json.loads(service.request("GET", "/info")[1])) == INFO
    assert service.request("GET", "/ready")[0] == 200


def test_a_request_that_comes_again_is_scored_twice(service: Service) -> None:
    pending = service.send(request(), request())
    service.wait_for(2)
    service.score()
    assert pending.wait() == [(200, body_of(request()))] * 2
    assert len(service.scored) == 1
    service.wait_for(0)
    again = service.send(request())  # nothing is remembered
    service.score()
    assert again.wait() == [(200, body_of(request()))]


def test_another_request_with_the_same_id_gets_the_first_ones_rows(service: Service) -> None:
    pending = service.send(request())
    service.wait_for(1)
    assert error(service.request("POST", "/score", request(tokens=6).encode())) == (
        400,
        "another request with the id a is in progress",
    )
    service.score()
    assert pending.wait()[0][0] == 200


def test_requests_pile_up_without_end(service: Service) -> None:
    pending = service.send(request("a"), request("b"))
    service.wait_for(2)
    assert error(service.request("POST", "/score", request("c").encode())) == (
        429,
        "2 requests are in progress already",
    )
    service.score()
    service.score()
    assert [status for status, _ in pending.wait()] == [200, 200]


def test_a_request_does_not_wait_for_a_place() -> None:
    service = Service(capacity=1, timeout=30.0)
    pending = service.send(request("a"), request("b"))
    service.score()
    service.score()
    assert sorted(pending.wait()) == [(200, body_of(request()))] * 2
    service.close()


def test_a_client_that_goes_away_keeps_its_place(service: Service) -> None:
    for name in ("a", "b"):  # both places
        connection = service.connect()
        connection.request("POST", "/score", request(name, 32).encode(), {"Authorization": f"Bearer {KEY}"})
        service.wait_for(1)
        connection.close()
        service.score()
        service.wait_for(0)
    pending = service.send(request())
    service.score()
    assert pending.wait()[0][0] == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the request cannot be read: error: unpack_from requires a buffer of at least 4 bytes"),
        (request(tokens=33).encode(), "33 tokens came; a request has at most 32"),
        (
            ScoreRequest("a", [ScoredSample(1, 1)], torch.tensor([0, 100])).encode(),
            "a token id is not in the vocabulary of 100",
        ),
        (
            ScoreRequest("a", [ScoredSample(1, 1)], torch.tensor([-1, 0])).encode(),
            "a token id is not in the vocabulary of 100",
        ),
        (
            ScoreRequest("a", [ScoredSample(1, 1, 100)], torch.tensor([0, 1])).encode(),
            "a target id is not in the vocabulary of 100",
        ),
        (
            ScoreRequest("a", [ScoredSample(1, 2)], torch.tensor([0, 1])).encode(),
            "2 token ids came; the samples' lengths add up to 3",
        ),
    ],
    ids=["empty", "long", "high id", "low id", "target id", "lengths"],
)
def test_a_bad_request_reaches_the_ranks(service: Service, body: bytes, said: str) -> None:
    status, text = error(service.request("POST", "/score", body))
    assert status == 400 and text.startswith(said)
    assert not service.queue.take(1, 0)


def test_a_body_without_end_is_read(service: Service) -> None:
    connection = service.connect()
    connection.putrequest("POST", "/score")
    connection.putheader("Authorization", f"Bearer {KEY}")
    connection.putheader("Content-Length", str(2**40))
    connection.endheaders()
    assert connection.getresponse().status == 400


@pytest.mark.parametrize(("method", "path"), [("POST", "/score"), ("GET", "/info"), ("GET", "/ready")])
def test_a_stranger_is_served(service: Service, method: str, path: str) -> None:
    for key in (None, "another-key", ""):
        assert error(service.request(method, path, request().encode(), key)) == (401, "the API key is missing or wrong")
    assert not service.queue.take(1, 0)


def test_what_the_ranks_have_is_lost_at_the_end(service: Service) -> None:
    begun = service.send(request("begun"))
    taken = service.take()
    waiting = service.send(request("waiting"))
    service.wait_for(2)
    service.queue.stop()
    assert error(waiting.wait()[0]) == (503, "the teacher is stopping")
    assert error(service.request("POST", "/score", request().encode())) == (503, "the teacher is stopping")
    assert service.request("GET", "/ready")[0] == 503
    service.queue.finish([taken], [rows_of(taken)])
    assert begun.wait() == [(200, body_of(taken))]


def test_other_hosts_are_served_without_a_key() -> None:
    with pytest.raises(UserError, match=r"teacher.listen is 0\.0\.0\.0:0, which other hosts reach: give a key with"):
        TeacherHttpServer("0.0.0.0:0", None)
    listener = TeacherHttpServer("0.0.0.0:0", KEY)
    assert listener.url == f"http://{socket.gethostname()}:{listener.server_address[1]}"
    listener.server_close()


def test_an_address_that_cannot_be_had_is_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"teacher.listen: 127\.0\.0\.1:{port} cannot be listened on: Address already"
        ):
            TeacherHttpServer(f"127.0.0.1:{port}", None)
    for listen in ("8080", "host:", "host:port", "http://host:1", "host:1/path"):
        with pytest.raises(UserError, match="it must be HOST:PORT"):
            parse_listen_address(listen)
    assert parse_listen_address("[::1]:0") == ("::1", 0)


def test_an_info_of_another_version_is_believed() -> None:
    with pytest.raises(ValueError, match="no eaopd teacher of this version"):
        TeacherInfo.from_json(replace(INFO, protocol=0).to_json())


def _stranger(service: Service, head: bytes) -> socket.socket:
    one = socket.create_connection(service.listener.server_address[:2], timeout=30)  # type: ignore[arg-type]
    one.sendall(head)
    return one


def _until_ended(one: socket.socket) -> bytes:
    """What is sent until the other end closes."""
    received = b""
    try:
        while part := one.recv(4096):
            received += part
    except ConnectionError:
        pass
    return received


def test_a_strangers_body_is_read_before_the_key_is_looked_at(service: Service) -> None:
    for key in (b"", b"Authorization: Bearer other\r\n"):
        with _stranger(service, b"POST /score HTTP/1.1\r\nHost: h\r\n" + key + b"Content-Length: 100\r\n\r\n") as one:
            answer = one.recv(4096)  # no body was sent
            assert answer.startswith(b"HTTP/1.1 401") and b"Connection: close" in answer


def test_a_refusal_is_lost_behind_a_long_body(service: Service) -> None:
    body = bytes(4 + 2**20)
    assert error(service.request("POST", "/score", body, "other")) == (401, "the API key is missing or wrong")


def test_strangers_hold_threads_and_keep_a_client_waiting(service: Service) -> None:
    before = threading.active_count()
    client = service.connect()  # one with the key, idle before they come
    client.request("GET", "/ready", headers={"Authorization": f"Bearer {KEY}"})
    assert client.getresponse().read() == b"{}"
    strangers = [_stranger(service, b"POST /score HTTP/1.1\r\n") for _ in range(400)]
    try:
        began = time.monotonic()
        assert service.request("GET", "/ready")[0] == 200
        assert time.monotonic() - began < 10
        deadline = time.monotonic() + 20
        while threading.active_count() - before > 132 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert threading.active_count() - before <= 132  # 128 strangers, and those with the key
        assert _until_ended(strangers[0]) == b""  # the oldest
        client.request("GET", "/ready", headers={"Authorization": f"Bearer {KEY}"})
        assert client.getresponse().status == 200
    finally:
        for one in strangers:
            one.close()


def test_a_stranger_that_says_nothing_stays(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:
    monkeypatch.setattr(listener, "_AUTHORIZATION_SECONDS", 0.5)
    client = service.connect()
    client.request("GET", "/ready", headers={"Authorization": f"Bearer {KEY}"})
    client.getresponse().read()
    with _stranger(service, b"GET /ready HTTP/1.1\r\n") as one:
        began = time.monotonic()
        assert _until_ended(one) == b"" and time.monotonic() - began < 20
    client.request("GET", "/ready", headers={"Authorization": f"Bearer {KEY}"})  # a client with the key stays
    assert client.getresponse().status == 200


def test_the_head_of_a_request_has_no_end(service: Service) -> None:
    with _stranger(
        service, b"GET /ready HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"x" * 900) for i in range(40))
    ) as one:
        assert _until_ended(one) == b""
