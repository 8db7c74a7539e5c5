"""Stores take no key: each listens on one address, and what a store holds is never told as success."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from eaopd_megatron.launch import local_ranks
from eaopd_megatron.launch.entrypoint import must_complete
from eaopd_megatron.utils.lifetime import ERROR_FILE_VARIABLE, LAUNCHER_PID_VARIABLE
from eaopd_megatron.utils.ports import listening_store


def listening() -> dict[int, str]:
    """Address by port of what this process listens on."""
    return {
        one.laddr.port: one.laddr.ip
        for one in psutil.Process().net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    }


def test_a_store_listens_to_everybody() -> None:
    before = listening()
    store = listening_store(seconds=5.0)
    store.set("key", "value")
    assert store.get("key") == b"value" and store.port > 0
    assert {ip for port, ip in listening().items() if port not in before} == {"127.0.0.1"}
    with pytest.raises(OSError):
        listening_store("203.0.113.7")  # an address of documentation


def test_a_name_that_means_loopback_here_alone_is_unreachable_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian's /etc/hosts has it; weight_sync.address may be the host's name."""
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    before = listening()
    with monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", lambda *arguments, **options: [entry])
        store = listening_store("trainer-7", seconds=5.0)
    store.set("key", "value")
    assert {ip for port, ip in listening().items() if port not in before} == {"0.0.0.0"}


def test_no_other_store_is_started() -> None:
    """torch's own binds all interfaces, whatever host it is given."""
    root = Path(__file__).resolve().parents[2]
    users = [
        str(file.relative_to(root))
        for folder in ("eaopd_megatron", "tools")
        for file in (root / folder).rglob("*.py")
        if "TCPStore(" in file.read_text()
    ]
    assert users == ["eaopd_megatron/utils/ports.py"]


@pytest.mark.parametrize(("finishes", "code"), [(True, 0), (False, 1)])
def test_a_worker_that_ends_early_with_0_is_a_finished_run(
    finishes: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    work = "lambda: None" if finishes else "lambda: __import__('os')._exit(0)"
    program = (
        f"import sys; from eaopd_megatron.launch.entrypoint import run_entrypoint; sys.exit(run_entrypoint({work}))"
    )
    command = (sys.executable, "-c", program)
    monkeypatch.setattr(local_ranks, "WORKER_COMMAND", command)
    assert local_ranks.launch_ranks([], 2, command=command, log_folder=tmp_path) == code
    line = f"error: rank 0 ended with exit code 0 before its work was done (log: {tmp_path}/rank_0.log)\n"
    assert capfd.readouterr().err == ("" if finishes else line)


def test_a_failure_with_exit_code_0_in_the_store_ends_a_rank_with_0() -> None:
    """As somebody wrote it there who is no rank."""
    program = """
import json, time
from eaopd_megatron.distributed import heartbeat
from eaopd_megatron.utils.ports import listening_store
store = listening_store()
with heartbeat.heartbeat_monitor(store, 0, 2):
    store.compare_set(heartbeat._FAILURE_KEY, "", json.dumps({"rank": 1, "message": "bye", "exit_code": 0}))
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, timeout=100)
    assert done.returncode == 1 and "rank 1 failed: bye" in done.stderr


def test_a_full_disk_ends_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file that says that rank 0 is busy cannot be written; the work goes on."""
    for name, value in {ERROR_FILE_VARIABLE: str(tmp_path / "gone/error"), LAUNCHER_PID_VARIABLE: "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    with must_complete():
        pass
