"""Servers that the trainer starts: how they fail to start, what they leave behind, and who knows their key.

The program is the double, as a process of its own; `test_real_server.py` starts the real one.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang import server as module
from eaopd_megatron.rollout.sglang.server import SGLangServer, SGLangSettings, sglang_servers
from eaopd_megatron.serving.process import _REDACTED
from eaopd_megatron.serving.supervisor import Supervisor, wait_until_serving

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = SGLangSettings(ROOT / "recipes/countdown/student", context_length=64, precision="fp32", api_key="a'secret")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces SGLang by another Python program; at first by the double."""

    def replace(*arguments: str) -> None:
        monkeypatch.setattr(module, "sglang_command", lambda cuda: [sys.executable, *arguments])

    monkeypatch.chdir(ROOT)
    replace("-m", "tools.sglang_double.server")
    yield replace


@pytest.fixture
def server(program: Callable[..., None], tmp_path: Path) -> Iterator[SGLangServer]:
    one = SGLangServer(SETTINGS, tmp_path / "server_0.log")
    yield one
    one.stop()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_api_key_is_told_to_others(server: SGLangServer) -> None:
    server.start()
    assert server.pid is not None and server.settings.api_key is not None
    assert server._key_file is not None and server._key_file.stat().st_mode & 0o077 == 0
    wait_until_serving([server], report=lambda _: None)
    assert not server._key_file.exists()
    assert server.settings.api_key not in Path(f"/proc/{server.pid}/cmdline").read_text()
    assert server.settings.api_key not in repr(server.settings)
    server.stop()
    log = server.log.read_text()
    assert "key=" in log and _REDACTED in log and server.settings.api_key not in log


def test_the_reason_of_a_failed_start_is_lost(program: Callable[..., None], server: SGLangServer) -> None:
    program("-c", "print('loading'); raise ValueError('the model has no weights')")
    server.start()
    with pytest.raises(UserError) as raised:
        wait_until_serving([server], report=lambda _: None)
    assert str(raised.value) == (
        f"rollout server 0 did not start; it ended with exit code 1: ValueError: the model has no weights "
        f"(log: {server.log})"
    )


def test_a_port_that_was_taken_meanwhile_ends_the_run(
    program: Callable[..., None], server: SGLangServer, tmp_path: Path
) -> None:
    program(
        "-c",
        textwrap.dedent(
            f"""
            import pathlib, runpy, sys
            marker = pathlib.Path({str(tmp_path / "second")!r})
            if not marker.exists():
                marker.touch()
                sys.exit("[Errno 98] error while attempting to bind: address already in use")
            runpy.run_module("tools.sglang_double.server", run_name="__main__")
            """
        ),
    )
    server.start()
    first = server.port
    wait_until_serving([server], report=lambda _: None)
    assert server.ready() and server.port != first


def test_a_server_that_never_serves_is_waited_for_without_end(
    program: Callable[..., None], server: SGLangServer
) -> None:
    program("-u", "-c", "import time; print('loading weights', flush=True); time.sleep(1000)")
    reported: list[str] = []
    server.start()
    while server.last_line() != "loading weights":
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"rollout server 0 does not serve after 0\.1 s; it runs: loading weights"):
        wait_until_serving([server], limit=0.1, interval=0.0, report=reported.append)
    assert any("loading weights" in line for line in reported)


def test_the_death_of_a_server_is_noticed_late(server: SGLangServer) -> None:
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    server.on_exit = ended.put
    server.start()
    wait_until_serving([server], report=lambda _: None)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    assert "was killed by 9" in ended.get(timeout=20)
    url = server.url
    server.start()  # comes back under the same URL
    wait_until_serving([server], report=lambda _: None)
    assert server.url == url


def test_a_server_leaves_processes_behind(program: Callable[..., None], server: SGLangServer) -> None:
    program(
        "-u",
        "-c",
        "import subprocess, time; print(subprocess.Popen(['sleep', '1000']).pid, flush=True); time.sleep(1000)",
    )
    server.start()
    while not server.last_line().isdigit():
        time.sleep(0.01)
    child = int(server.last_line())
    assert alive(child)
    server._process.terminate()  # type: ignore[union-attr]
    server.stop()
    for _ in range(1000):
        if not alive(child):
            break
        time.sleep(0.01)
    assert not alive(child)


def test_a_killed_trainer_leaves_its_servers(tmp_path: Path) -> None:
    trainer = f"""
        import sys, time
        from pathlib import Path
        from eaopd_megatron.rollout.sglang import server as module
        from eaopd_megatron.serving.supervisor import Supervisor
        module.sglang_command = lambda cuda: [sys.executable, "-m", "tools.sglang_double.server"]
        settings = module.SGLangSettings(Path("x"), context_length=64)
        servers = module.sglang_servers(settings, 1, Path({str(tmp_path)!r}))
        with Supervisor(servers):
            print(servers[0].pid, flush=True)
            time.sleep(1000)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-u", "-c", textwrap.dedent(trainer)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = next(int(line) for line in process.stdout if line.strip().isdigit())
        assert alive(pid)
        process.kill()
    for _ in range(1000):
        if not alive(pid):
            break
        time.sleep(0.01)
    assert not alive(pid)


def test_one_server_of_two_outlives_a_failed_start(program: Callable[..., None], tmp_path: Path) -> None:
    program(
        "-c",
        "import runpy, sys; '31' in sys.argv and sys.exit('Error: no')\n"
        "runpy.run_module('tools.sglang_double.server', run_name='__main__')",
    )
    servers = sglang_servers(SETTINGS, 2, tmp_path)
    servers[1].port = 31
    with pytest.raises(UserError, match=r"rollout server 1 did not start.*Error: no"), Supervisor(servers):
        raise AssertionError("it did not start")
    assert not any(one.alive() for one in servers)


def test_sglang_is_missing_without_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(module.SGLANG_VENV_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"SGLang is not installed .*: bash tools/install_sglang_cpu.sh"):
        module.sglang_command(cuda=False)


def test_the_servers_of_one_host_share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    settings = SGLangSettings(Path("x"), context_length=64, tensor_parallel=2)
    assert settings.gpu_flags(2) == ["--base-gpu-id", "2"]
    with pytest.raises(UserError, match="needs GPUs 4 to 5 of this host, which shows 4 "):
        settings.gpu_flags(4)


def test_a_colocated_server_cannot_give_its_memory_back() -> None:
    for colocated in (False, True):
        settings = replace(SETTINGS, colocated=colocated)
        assert ("--enable-memory-saver" in settings.flags(1, cuda=True)) == colocated
        assert "--enable-memory-saver" not in settings.flags(1, cuda=False)  # it needs CUDA
