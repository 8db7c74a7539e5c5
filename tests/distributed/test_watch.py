"""One rank's fault must end the others, whoever started them, and even when they wait in a collective."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._C import _distributed_c10d

from eaopd_megatron.distributed.heartbeat import (
    _flight_recorder_traces,
    dump_flight_recorder,
    enable_flight_recorder,
)

Start = Callable[[str], list[subprocess.Popen[str]]]
SCRIPT = """
    import sys, time
    import torch.distributed as dist
    from pathlib import Path
    from eaopd_megatron.errors import UserError
    from eaopd_megatron.distributed.heartbeat import dump_flight_recorder, enable_flight_recorder, heartbeat_monitor
    rank, port, fate, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    if fate == "missing":
        enable_flight_recorder(folder, 100)
        import torch
        dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=3)
        dist.all_reduce(torch.ones(2))
    record = lambda: dump_flight_recorder(folder, rank)
    with heartbeat_monitor(store, rank, 3, timeout_seconds=3.0, on_failure=record):
        store.set(f"up/{rank}", "1")
        store.wait([f"up/{r}" for r in range(3)])
        print("up", flush=True)
        if rank == 1 and fate == "raise":
            raise UserError("the disk is full")
        if fate == "missing":
            if rank == 1:
                raise UserError("the collective is left out")
            dist.all_reduce(torch.ones(7))
        if fate != "end":
            time.sleep(3600)
        elif rank != 0:
            sys.stdin.readline()
"""


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Start]:
    """Start three ranks of the script; ends them after the test."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    started: list[subprocess.Popen[str]] = []

    def start(fate: str) -> list[subprocess.Popen[str]]:
        for rank in range(3):
            started.append(
                subprocess.Popen(
                    [sys.executable, str(script), str(rank), str(store.port), fate, str(tmp_path / "trace")],
                    env={**os.environ, "PYTHONPATH": os.getcwd()},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "up\n"
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_an_error_of_one_rank_is_the_message_of_all(ranks: Start) -> None:
    processes = ranks("raise")
    for rank in (0, 2):
        _, err = processes[rank].communicate(timeout=60)
        assert processes[rank].returncode == 1
        assert err == f"error: rank {rank} stops: rank 1 failed: the disk is full\n"


def test_a_rank_that_falls_silent_ends_the_others(ranks: Start) -> None:
    processes = ranks("wait")
    processes[1].send_signal(signal.SIGSTOP)  # a hang: the process is there and says nothing
    for rank in (0, 2):
        _, err = processes[rank].communicate(timeout=60)
        assert processes[rank].returncode == 1
        assert "no sign of life from rank 1" in err or "stops: rank" in err


def test_a_rank_that_ended_in_good_order_alarms_nobody(ranks: Start) -> None:
    processes = ranks("end")
    assert processes[0].wait(60) == 0
    with pytest.raises(subprocess.TimeoutExpired):
        processes[1].wait(6)  # twice the silence that would count as death
    for rank in (1, 2):
        _, err = processes[rank].communicate("\n", timeout=60)
        assert (processes[rank].returncode, err) == (0, "")


def test_nobody_can_tell_which_rank_a_collective_waited_for(ranks: Start, tmp_path: Path) -> None:
    for process in ranks("missing"):
        process.communicate(timeout=60)
        assert process.returncode == 1
    entered = {}
    for rank in range(3):  # pickled by torch, for torch.distributed.flight_recorder
        record = pickle.loads((tmp_path / "trace" / f"rank_{rank}").read_bytes())
        entered[rank] = [entry["input_sizes"] for entry in record["entries"]]
    assert entered == {0: [[[2]], [[7]]], 1: [[[2]]], 2: [[[2]], [[7]]]}


def test_torch_has_moved_its_flight_recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private: `_dump_fr_trace` and, in builds for CUDA, `_dump_nccl_trace` of torch._C._distributed_c10d."""
    assert list(_flight_recorder_traces()) == ["rank_"]
    assert pickle.loads(_flight_recorder_traces()["rank_"]())["version"]
    if torch.distributed.is_nccl_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert pickle.loads(_flight_recorder_traces()["rank_"]())["version"]


def test_the_dump_of_a_gpu_lacks_what_nccl_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for NCCL's recorder, which only builds for CUDA have. torch's tool reads the files named rank_*."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", lambda: b"nccl", raising=False)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "10")
    dump_flight_recorder(tmp_path, 3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gloo_rank_3", "rank_3"]
    assert (tmp_path / "rank_3").read_bytes() == b"nccl"
    assert "entries" in pickle.loads((tmp_path / "gloo_rank_3").read_bytes())


def test_a_dump_that_hangs_keeps_a_failed_rank_alive(tmp_path: Path) -> None:
    """It holds the interpreter's lock, as a call into a broken CUDA may."""
    code = """
        import ctypes
        from eaopd_megatron.distributed import heartbeat
        heartbeat._DUMP_SECONDS = 1.0
        hang = lambda: ctypes.PyDLL(None).sleep(100)  # PyDLL keeps the lock
        heartbeat._HeartbeatThread(None, 0, 2, 1.0, hang)._exit("rank 1 failed: why", 1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "error: rank 0 stops: rank 1 failed: why" in done.stderr
    assert "Timeout" in done.stderr, "where it hung"


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        (7, {}, {"TORCH_FR_BUFFER_SIZE": "7", "TORCH_FR_DUMP_TEMP_FILE": "F/rank_", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}),
        (0, {}, {"TORCH_FR_BUFFER_SIZE": "0"}),
        (
            7,
            {"TORCH_NCCL_TRACE_BUFFER_SIZE": "9", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "there_"},
            {"TORCH_FR_BUFFER_SIZE": "9", "TORCH_FR_DUMP_TEMP_FILE": "there_", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"},
        ),
    ],
)
def test_the_recorder_is_set_otherwise_than_the_recipe_or_the_user_says(
    monkeypatch: pytest.MonkeyPatch, size: int, given: dict[str, str], expected: dict[str, str]
) -> None:
    """torch records 2000 collectives where nothing is set; of a new and an old name the new one wins."""
    monkeypatch.setattr(os, "environ", dict(given))
    enable_flight_recorder(Path("F"), size)
    assert {name: value for name, value in os.environ.items() if name not in given} == expected
