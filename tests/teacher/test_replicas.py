"""The replicas of a teacher that the trainer starts: how they come, come back and go."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.process import _REDACTED, ServerProcess
from eaopd_megatron.serving.supervisor import Supervisor
from eaopd_megatron.teacher.payload import TopKPayload
from eaopd_megatron.teacher.protocol import ScoredSample, ScoreRequest, TeacherInfo
from eaopd_megatron.teacher.replicas import TeacherReplicas

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/countdown/eopd.yaml"
pytestmark = pytest.mark.timeout(200)

PROGRAM = """
import http.server, os, sys, pathlib
starts = pathlib.Path(sys.argv[2])
with starts.open("a") as file: file.write("x")
if len(starts.read_text()) > int(sys.argv[3]): sys.exit("Error: no memory")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die": os._exit(3)
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
print("serves, and tells", open(sys.argv[4]).read() if len(sys.argv) > 4 else "", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Program(ServerProcess):
    """Serves on its first `lives` starts and fails on the others."""

    kind = "teacher replica"

    def __init__(self, folder: Path, lives: int, **options: str) -> None:
        super().__init__(folder / "log", **options)
        self._starts, self._lives = folder / "starts", lives

    def command(self) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(self.port), str(self._starts), str(self._lives)]

    def key_arguments(self, file: Path) -> list[str]:
        return [str(file)]

    def environment(self) -> Mapping[str, str | None]:
        return {"PYTHONPATH": None}

    @property
    def starts(self) -> int:
        return len(self._starts.read_text()) if self._starts.exists() else 0

    def die(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.request("GET", "/die")
            connection.getresponse()


def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        time.sleep(0.02)


def test_a_dead_replica_is_not_started_again_or_for_ever(tmp_path: Path) -> None:
    server, reported = Program(tmp_path, lives=2), list[str]()
    supervisor = Supervisor([server], minutes=1, report=reported.append)
    supervisor.start()
    supervisor.ready.result(60)
    port = server.port
    server.die()
    until(lambda: server.starts == 2 and server.ready())
    assert server.port == port
    assert f"teacher replica {server.url} is started again: it ended with exit code 3" in reported[-1]
    server.die()
    until(lambda: "is not started again" in reported[-1])
    assert "died 3 times in a row and is not started again: it ended with exit code 1: Error: no" in reported[-1]
    supervisor.stop()
    supervisor.stop()


@pytest.mark.parametrize(("given", "wanted"), [("", "10.1.2.3"), ("localhost,.site", "localhost,.site,10.1.2.3")])
def test_a_server_asks_a_sites_proxy_for_itself(
    given: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang ends when its own first request fails, and reads the proxy's variables for it."""
    monkeypatch.setenv("no_proxy", given)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = Program(tmp_path, lives=1, host="10.1.2.3")
    server.start()
    environment = psutil.Process(server.pid).environ()
    assert environment["no_proxy"] == environment["NO_PROXY"] == wanted
    server.stop()


def test_another_process_takes_the_port_of_a_replica_that_is_started_again(tmp_path: Path) -> None:
    server = Program(tmp_path, lives=2)
    server.start()
    until(server.ready)
    server.die()
    until(lambda: not server.alive())
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", server.port))
    server.start()
    until(server.ready)
    server.stop()


def test_gpus_are_shared_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    layout = ("teacher.placement=separate", "teacher.replicas=2", "teacher.tensor_parallel=2")
    options: dict[str, Any] = {"first_gpu": 0, "report": print}
    fitting = TeacherReplicas(load_recipe(RECIPE, layout), "", tmp_path, **options)
    made = [fitting._separate(tmp_path / f"{i}.log", gpus, 64).environment() for i, gpus in enumerate(fitting._gpus())]
    assert made == [{"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "6,7"}]
    with pytest.raises(
        UserError, match=r"teacher\.replicas=2 of 2 GPUs each take GPUs 2 to 5 of this host, which shows 4"
    ):
        TeacherReplicas(load_recipe(RECIPE, layout), "", tmp_path, **{**options, "first_gpu": 2}).start(64)


def test_a_replica_that_never_came_is_started_without_end(tmp_path: Path) -> None:
    server = Program(tmp_path, lives=0)
    supervisor = Supervisor([server], minutes=1, report=lambda _: None)
    supervisor.start()
    with pytest.raises(UserError, match="teacher replica 0 did not start; it ended with exit code 1: Error: no memory"):
        supervisor.ready.result(60)
    supervisor.stop()
    assert server.starts == 1


def test_a_replica_outlives_the_run_that_ends_while_it_starts(tmp_path: Path) -> None:
    server = Program(tmp_path, lives=9)
    supervisor = Supervisor([server], minutes=1, report=lambda _: None)
    supervisor.start()
    until(lambda: server.pid is not None)
    supervisor.stop()
    assert not server.alive()


def test_a_replica_tells_its_key(tmp_path: Path) -> None:
    server = Program(tmp_path, lives=1, api_key="a-secret")
    server.start()
    assert server._key_file is not None and server._key_file.stat().st_mode & 0o077 == 0
    until(server.ready)
    assert not server._key_file.exists()
    server.stop()
    assert "a-secret" not in server.log.read_text() and _REDACTED in server.log.read_text()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[TeacherReplicas]:
    options = ("teacher.placement=separate", f"run.folder={tmp_path}", "teacher.precision=fp32")
    one = TeacherReplicas(load_recipe(RECIPE, options), "", tmp_path / "teachers", first_gpu=0, report=lambda _: None)
    yield one
    one.close()


def ask(url: str, method: str, path: str, key: str | None, body: bytes | None = None) -> bytes:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
    connection.request(method, path, body, {"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    return answer.read()


def test_a_teacher_that_the_trainer_started_is_another_tells_its_key_or_stays(replicas: TeacherReplicas) -> None:
    """The service as it is. How it comes back is tested by the campaign."""
    replicas.start(64)
    arriving = replicas.wait_urls()
    while True:
        try:
            next(arriving)
        except StopIteration as done:
            (url,) = done.value
            break
    info = TeacherInfo.from_json(json.loads(ask(url, "GET", "/info", replicas.api_key)))
    recipe = load_recipe(RECIPE)
    assert info.fingerprint == HfFolder.open(recipe.teacher.model).fingerprint
    assert isinstance(info.payload_format, TopKPayload)
    request = ScoreRequest("a", [ScoredSample(3, 4)], torch.arange(7, dtype=torch.int32))
    assert (
        len(ask(url, "POST", "/score", replicas.api_key, request.encode())) == 4 * info.payload_format.bytes_per_token
    )

    (server,) = replicas._servers
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(family) == 2 and replicas.api_key is not None
    assert not any(replicas.api_key in argument for process in family for argument in process.cmdline())
    replicas.close()
    assert not psutil.wait_procs(family, 5)[1]
    assert replicas.api_key not in server.log.read_text()
    assert "stopped by SIGTERM" in server.log.read_text()
