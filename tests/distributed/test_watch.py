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
