"""The launcher: ranks start together, end together, and the cause of a failure is the one line that a user sees."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.config import StudentConfig
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.launch import local_ranks as launching
from eaopd_megatron.launch.local_ranks import (
    is_started_rank,
    launch_ranks,
    rank_environment,
    student_world_size,
    teacher_world_size,
)

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from typing import Any
rank = int(os.environ["RANK"])
here = Path(sys.argv[1])
def report(message, user, at=None, code=1):
    text = json.dumps({"message": message, "exit_code": code, "rank": rank, "user": user, "time": at or time.time()})
    Path(os.environ["EAOPD_ERROR_FILE"] + f".{rank}").write_text(text)
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.02)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a worker's text, after HEAD, on some ranks in this process's launcher."""
    monkeypatch.setattr(launching, "FAILURE_GRACE_SECONDS", 1.0)

    def run(body: str, ranks: int = 2, logs: Path | None = tmp_path / "logs") -> int:
        worker = tmp_path / "worker.py"
        worker.write_text(HEAD + body)
        return launch_ranks([str(tmp_path)], ranks, command=[sys.executable, str(worker)], log_folder=logs)

    return run


def gone(pid: int, seconds: float = 30) -> bool:
    """Whether a process ends in time (a zombie has ended)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_do_not_find_each_other(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(
        """
import torch.distributed as dist, torch
if int(os.environ["LOCAL_RANK"]) != rank: sys.exit(3)
dist.init_process_group("gloo")
total = torch.tensor([rank + 1])
dist.all_reduce(total)
print(f"rank {rank} of {dist.get_world_size()} sees {total.item()}, {os.environ['OMP_NUM_THREADS']} thread")
dist.destroy_process_group()
"""
    )
    assert code == 0
    shown = capfd.readouterr()
    assert "rank 0 of 2 sees 3, 1 thread" in shown.out
    assert "rank 1" not in shown.out
    assert "rank 1 of 2 sees 3" in (tmp_path / "logs" / "rank_1.log").read_text()
    assert shown.err == ""


def test_user_error_is_said_twice_or_its_consequence_instead(
    run: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(
        """
if rank == 2: report("connection closed", False, at=1.0); sys.exit(9)
report(f"model of rank {rank}: no such\\nfolder", True, at=10.0 - rank, code=2); sys.exit(2)
""",
        ranks=3,
    )
    assert code == 2
    assert capfd.readouterr() == ("", "error: model of rank 1: no such folder\n")


def test_killed_rank_leaves_the_others_hanging_or_is_not_named(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(
        """
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 2:
    report("RuntimeError: connection closed by peer", False, at=1.0); sys.exit(1)
child = subprocess.Popen(["sleep", "1000"])
(here / "pids").write_text(f"{os.getpid()} {child.pid}")
time.sleep(1000)
""",
        ranks=3,
    )
    assert code == 137
    assert capfd.readouterr().err == f"error: rank 1 was killed by SIGKILL (log: {tmp_path}/logs/rank_1.log)\n"
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_crash_is_reported_without_its_reason(
    run: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "rank_0.log"
    log.parent.mkdir()
    log.write_text("OldError: of an earlier run\n")
    body = """
if rank == 0:
    def excepthook(*what):
        sys.stderr.write("Traceback ...\\n[rank0]: torch.OutOfMemoryError: 5 GiB\\n[rank0]:[W1] group not destroyed\\n")
    sys.excepthook = excepthook
    1 / 0
time.sleep(1000)
"""
    assert run(body) == 1
    said = capfd.readouterr().err
    assert said == f"error: rank 0 ended with exit code 1: torch.OutOfMemoryError: 5 GiB (log: {log})\n"
    assert run("if rank == 0: sys.exit(4)\ntime.sleep(1000)") == 4
    assert capfd.readouterr().err == f"error: rank 0 ended with exit code 4 (log: {log})\n"
    assert run("report('ValueError: odd', False)\nsys.exit(1)", ranks=1) == 1
    assert capfd.readouterr().err == f"error: rank 0 ended with exit code 1: ValueError: odd (log: {log})\n"


def test_logs_without_a_folder_are_lost_on_a_crash_or_left_after_success(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert run("pass", logs=None) == 0
    assert run("report('no', True); sys.exit(1)", logs=None) == 1
    assert list((tmp_path / "tmp").iterdir()) == []
    assert run("sys.exit('boom')", ranks=1, logs=None) == 1
    found = re.search(r"boom \(log: (.*)\)", capfd.readouterr().err)
    assert found
    assert Path(found[1]).read_text() == "boom\n"


class Launcher:
    """A launcher in a process of its own, which can be killed."""

    def __init__(self, folder: Path, body: str, stop_seconds: float) -> None:
        worker = folder / "worker.py"
        worker.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{HEAD}{body}")
        program = (
            "import signal, sys; from eaopd_megatron.launch import local_ranks as l\n"
            # A shell's background job ignores SIGINT, and so would all that it starts.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"l.SHUTDOWN_SECONDS, l.FAILURE_GRACE_SECONDS = {stop_seconds}, 1.0\n"
            f"sys.exit(l.launch_ranks([{str(folder)!r}], 2, command=[sys.executable, {str(worker)!r}]))"
        )
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )

    def ready(self) -> list[int]:
        """The ranks' process ids, once they have written `ready.RANK`."""
        wait_until(lambda: all((self.folder / f"ready.{rank}").exists() for rank in range(2)))
        return [int((self.folder / f"ready.{rank}").read_text()) for rank in range(2)]

    def result(self) -> tuple[int, list[str]]:
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said.splitlines()


READY = """
(here / f"tmp.{rank}").write_text(str(os.getpid()))
(here / f"tmp.{rank}").rename(here / f"ready.{rank}")
time.sleep(1000)
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    started: list[Launcher] = []

    def start(body: str, stop_seconds: float = 60.0) -> Launcher:
        started.append(Launcher(tmp_path, body, stop_seconds))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


SAVE_ON_SIGTERM = """
def save(*_):
    time.sleep(0.3)
    (here / f"saved.{rank}").touch()
    sys.exit(143 * rank)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, lambda *_: (here / "interrupted").touch())
"""


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_ranks_before_they_have_saved(
    launcher: Callable[..., Launcher], tmp_path: Path, name: signal.Signals
) -> None:
    started = launcher(SAVE_ON_SIGTERM + READY)
    started.ready()
    started.process.send_signal(name)
    code, said = started.result()
    assert code == 128 + name
    assert said[-1] == f"stopped by {name.name}"
    assert [(tmp_path / f"saved.{rank}").exists() for rank in range(2)] == [True, True]
    assert not (tmp_path / "interrupted").exists()


SLOW_SAVE = """
from eaopd_megatron.launch.entrypoint import must_complete
def save(*_):
    with must_complete():
        time.sleep(3)
        (here / f"saved.{rank}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
"""


def test_a_rank_that_still_saves_is_killed(launcher: Callable[..., Launcher], tmp_path: Path) -> None:
    """The time begins anew as long as rank 0 says that it saves."""
    started = launcher(SLOW_SAVE + READY, stop_seconds=0.5)
    started.ready()
    started.process.send_signal(signal.SIGTERM)
    code, said = started.result()
    assert (code, said[-1]) == (143, "stopped by SIGTERM")
    assert [(tmp_path / f"saved.{rank}").exists() for rank in range(2)] == [True, True]


DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + READY


def test_a_rank_that_ignores_the_signal_lives_for_ever(launcher: Callable[..., Launcher]) -> None:
    started = launcher(DEAF, stop_seconds=0.5)
    pids = started.ready()
    started.process.send_signal(signal.SIGTERM)
    code, said = started.result()
    assert (code, said[-1]) == (143, "error: stopped by SIGTERM; rank 0, 1 had not ended and was killed")
    assert all(gone(pid) for pid in pids)


def test_a_second_interrupt_waits_too(launcher: Callable[..., Launcher]) -> None:
    started = launcher(DEAF, stop_seconds=1000.0)
    pids = started.ready()
    started.process.send_signal(signal.SIGINT)
    said = started.process.stderr
    assert said
    wait_until(lambda: bool(select.select([said], [], [], 0)[0]))
    assert said.readline().startswith("SIGINT: the ranks have 1000 s to save their state")
    started.process.send_signal(signal.SIGINT)
    assert started.result()[0] == 130
    assert all(gone(pid) for pid in pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
def test_ranks_outlive_a_killed_launcher(launcher: Callable[..., Launcher]) -> None:
    started = launcher("from eaopd_megatron.utils.lifetime import die_with_parent\ndie_with_parent()\n" + DEAF)
    pids = started.ready()
    started.process.kill()
    assert all(gone(pid) for pid in pids)


SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "n[1-2]",
}


def test_a_batch_script_or_a_lone_task_is_taken_for_a_rank() -> None:
    assert is_started_rank(SRUN)
    assert is_started_rank({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert not is_started_rank({})
    assert not is_started_rank({"RANK": "0"})
    assert not is_started_rank({**SRUN, "SLURM_NTASKS": "1"})
    assert not is_started_rank({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"})


def test_srun_tasks_do_not_agree_where_to_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = rank_environment(SRUN)
    assert {name: found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
    }
    port = found["MASTER_PORT"]
    assert 15000 <= int(port) < 30000
    assert rank_environment({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})["MASTER_PORT"] == port
    assert rank_environment({**SRUN, "SLURM_STEP_ID": "3"})["MASTER_PORT"] != port
    assert rank_environment({**SRUN, "SLURM_JOB_ID": "78"})["MASTER_PORT"] != port
    given = rank_environment({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "5"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("head", "5")


def test_a_missing_scontrol_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        rank_environment(SRUN)
    assert rank_environment({**SRUN, "SLURM_JOB_NODELIST": "n7"})["MASTER_ADDR"] == "n7"


def test_torchruns_variables_are_overwritten() -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert rank_environment({**SRUN, **given}) == given


@pytest.mark.parametrize(
    ("devices", "tensor", "data", "ranks"),
    [(None, 2, None, 2), (None, 2, 3, 6), (8, 2, None, 8), (8, 2, 2, 4), (7, 2, None, 6), (1, 1, None, 1)],
)
def test_ranks_do_not_fill_the_devices(
    monkeypatch: pytest.MonkeyPatch, devices: int | None, tensor: int, data: int | None, ranks: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices is not None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices or 0)
    assert student_world_size(StudentConfig(model="m", tensor_parallel=tensor, data_parallel=data)) == ranks


@pytest.mark.parametrize(("devices", "ranks"), [(None, 4), (8, 8), (7, 4), (16, 16)])
def test_too_few_ranks_are_started_for_the_experts(
    monkeypatch: pytest.MonkeyPatch, devices: int | None, ranks: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: devices is not None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices or 0)
    assert student_world_size(StudentConfig(model="m", tensor_parallel=2, expert_parallel=4)) == ranks


@pytest.mark.parametrize(("tensor", "data"), [(8, None), (2, 3)])
def test_more_ranks_than_devices_share_one(monkeypatch: pytest.MonkeyPatch, tensor: int, data: int | None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match="more than the 4 GPUs of this host"):
        student_world_size(StudentConfig(model="m", tensor_parallel=tensor, data_parallel=data))


@pytest.mark.parametrize(
    ("options", "ranks"),
    [({"pipeline_parallel": 2}, 2), ({"expert_parallel": 4}, 4), ({"tensor_parallel": 2, "expert_parallel": 4}, 4)],
)
def test_a_teacher_has_other_ranks_than_its_layout_takes(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], ranks: int
) -> None:
    layout = ParallelLayout(**options)
    assert teacher_world_size(layout) == ranks
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: ranks - 1)
    with pytest.raises(UserError, match=f"the teacher needs {ranks} ranks .* more than the {ranks - 1} GPUs"):
        teacher_world_size(layout)
