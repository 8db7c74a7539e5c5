"""The verbs of the Slurm scripts: ports, ranks, restarts, preflight table, staged models, failure report."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.slurm_job.allocate import staged_path
from eaopd_megatron.slurm_job.preflight import NodeReport, busy_gpus, find_faults, inspect_node, preflight_report
from eaopd_megatron.slurm_job.ranks import SlurmStep, failure_report
from eaopd_megatron.slurm_job.services import count_trainer_start, restart_service, stage_model, wait_for_services
from eaopd_megatron.utils import ports
from eaopd_megatron.utils.ports import claim_port, node_address


@pytest.fixture(autouse=True)
def no_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep runs of the checkout and variables of a site out of the tests."""
    for name in ("EAOPD_MODELS", "EAOPD_STAGE", "EAOPD_PORTS", "EAOPD_INTERFACE", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EAOPD_SHARED", str(tmp_path))


# Ports


def test_two_jobs_meet_on_one_port() -> None:
    """The first job has claimed its port but does not listen on it yet."""
    first = claim_port("127.0.0.1", seed=7)
    second = claim_port("127.0.0.1", seed=7)
    assert first.port != second.port
    with pytest.raises(UserError, match=f"port {first.port} of 127.0.0.1 is taken"):
        claim_port("127.0.0.1", first=first.port, wait_seconds=0.3)


def test_a_name_of_the_loopback_is_taken_for_a_nodes_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Debian maps a host's own name to 127.0.1.1, where other nodes would find themselves."""
    said = "its name has the address 127.0.1.1, which no other node reaches: set EAOPD_INTERFACE"
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.delenv("EAOPD_INTERFACE", raising=False)
    for count, known in (("3", True), ("1", False)):
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", count)
        assert (said in inspect_node(tmp_path / "a/b/c/token", "", [], None).problems) is known
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("EAOPD_INTERFACE", "lo")
    assert said not in inspect_node(tmp_path / "a/b/c/token", "", [], None).problems


def test_a_port_stays_taken_when_its_process_has_ended() -> None:
    code = "from eaopd_megatron.utils.ports import claim_port\nclaim = claim_port('127.0.0.1', seed=3)\n"
    code += "claim.keep_across_exec()\nprint(claim.port)"
    port = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert claim_port("127.0.0.1", first=port, wait_seconds=0.3).port == port


@pytest.fixture
def taken() -> Iterator[int]:
    """Return a port on which another program listens on all addresses."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_taken_port_is_given_to_a_service(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ports.PORT_RANGE_VARIABLE, f"{taken}-{taken}")
    with pytest.raises(UserError, match=f"every port of EAOPD_PORTS={taken}-{taken} is taken on 127.0.0.1"):
        claim_port("127.0.0.1")


@pytest.mark.parametrize("text", ["15000", "20000-10000", "80-90", "a-b"])
def test_a_port_range_that_is_none_is_read_as_one(text: str) -> None:
    with pytest.raises(UserError, match="EAOPD_PORTS is"):
        ports.port_range({ports.PORT_RANGE_VARIABLE: text})


def test_services_listen_on_an_interface_that_the_node_has_not() -> None:
    with pytest.raises(UserError, match=r"EAOPD_INTERFACE is ib77, which this node has not \(it has .*lo"):
        node_address({ports.INTERFACE_VARIABLE: "ib77"})
    assert node_address({ports.INTERFACE_VARIABLE: "lo"}) == "127.0.0.1"


# Steps


def task(number: int, of: int, step: str = "4") -> dict[str, str]:
    return {
        "SLURM_PROCID": str(number),
        "SLURM_NTASKS": str(of),
        "SLURM_LOCALID": str(number),
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": step,
        "SLURMD_NODENAME": "localhost",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }


def test_ranks_of_a_step_do_not_meet(tmp_path: Path) -> None:
    step = SlurmStep("teacher_1", tmp_path, gpus=(2, 2))
    _, main = step.prepare(["x", "listen={listen}"], task(0, 2))
    _, other = step.prepare(["x", "listen={listen}"], task(1, 2))
    meeting = {key: main[key] for key in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")}
    assert meeting.items() <= other.items()
    assert (main["RANK"], other["RANK"], other["CUDA_VISIBLE_DEVICES"]) == ("0", "1", "2,3")


def test_a_service_that_is_started_again_is_sought_at_its_old_port(tmp_path: Path) -> None:
    step = SlurmStep("server_0", tmp_path)
    step.url_file.write_text("http://127.0.0.1:29998\n")
    command, _ = step.prepare(["serve", "--listen", "{listen}"], task(0, 1))
    assert command == ["serve", "--listen", "127.0.0.1:29998"]
    assert step.url_file.read_text() == "http://127.0.0.1:29998\n"


def test_ranks_meet_where_those_of_the_last_start_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eaopd_megatron.slurm_job.ranks._RENDEZVOUS_SECONDS", 0.3)
    step = SlurmStep("student", tmp_path)
    step.prepare(["x"], task(0, 2, step="4"))
    with pytest.raises(UserError, match="does not say where the ranks of student meet"):
        step.prepare(["x"], task(1, 2, step="5"))


def test_a_service_takes_gpus_that_its_node_has_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="server_9 needs GPUs 8 to 9 of its node, which shows 8"):
        SlurmStep("server_9", tmp_path, gpus=(8, 2)).prepare(["x"], task(0, 1))


def test_a_site_shows_each_task_its_own_gpu_alone(tmp_path: Path) -> None:
    """Only the first replica of a node: what a second one would be shown are the first one's."""
    shown = task(1, 2) | {"CUDA_VISIBLE_DEVICES": "5"}
    first, second = (SlurmStep("teacher_0", tmp_path, gpus=(at, 2)) for at in (0, 2))
    first.prepare(["x"], task(0, 2))
    assert first.prepare(["x"], shown)[1]["CUDA_VISIBLE_DEVICES"] == "5"
    with pytest.raises(UserError, match=r"GPUs 2 to 3 of its node, which shows 1: let each task see all of them"):
        second.prepare(["x"], shown)


# Restarts


def died(folder: Path, seconds: float) -> bool:
    (folder / "server_0.srun").write_text("srun: error: out of luck\n\n")
    return restart_service("server_0", folder, folder / "server_0.log", lived=seconds, max_deaths=3)


def test_a_service_that_dies_is_given_up_too_early_or_never(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Consecutive deaths are counted across processes; five minutes of life reset the count."""
    assert [died(tmp_path, seconds) for seconds in (1, 1, 300, 1, 1)] == [True, True, True, True, False]
    why = f"srun: error: out of luck (log: {tmp_path / 'server_0.log'})"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"[job] server_0 died and is started again: {why}"
    assert said[4] == f"[job] server_0 died 3 times in a row and is not started again: {why}"
    assert (tmp_path / "server_0.lost").read_text() == said[4].removeprefix("[job] ") + "\n"


def test_a_trainer_without_a_new_checkpoint_is_started_for_ever(tmp_path: Path) -> None:
    folder = tmp_path / "cluster/job_7"
    folder.mkdir(parents=True)
    for checkpoint in ("none", "none", "step_000002", "step_000002"):
        count_trainer_start(folder, checkpoint, max_restarts=1)
    with pytest.raises(UserError, match=r"^2 starts without a new checkpoint \(newest: step_000002\): not started"):
        count_trainer_start(folder, "step_000002", max_restarts=1)


# Waiting


def test_a_service_that_was_given_up_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "server_0.lost").write_text("server_0 died 3 times in a row\n")
    with pytest.raises(UserError, match="server_0 died 3 times in a row"):
        wait_for_services(["server_0"], tmp_path, tmp_path, key="k", minutes=1, report=print)


def test_who_waits_is_not_told_for_what(tmp_path: Path) -> None:
    (tmp_path / "server_0.log").write_text("loading weights 3 of 9\n")
    said: list[str] = []
    with pytest.raises(UserError, match=r"server_0 is not ready after 0.005 minutes: loading weights 3 of 9"):
        wait_for_services(["server_0"], tmp_path, tmp_path, key="k", minutes=0.005, report=said.append, interval=0.0)
    assert said[0].startswith("0 of 1 ready after") and said[0].endswith("server_0: loading weights 3 of 9")


# Nodes


def node(name: str, **changes: object) -> NodeReport:
    versions = {"torch": "2.13.0", "megatron-core": "0.16.1", "sglang": "0.5.21", "nccl": "2.29.7"}
    sound = NodeReport(name, "10.0.0.1", "3.11.7", versions, "a" * 40, gpus=8, disk=2**40)
    return replace(sound, **changes)  # type: ignore[arg-type]


def test_a_report_among_other_words_is_lost() -> None:
    text = f"loading modules\n{node('n0').line()}\nbye\n{node('n1', problems=('no disk',)).line()}\n"
    assert NodeReport.read(text) == [node("n0"), node("n1", problems=("no disk",))]


def test_nodes_of_unlike_environments_train_together() -> None:
    assert find_faults([node("n0"), node("n1")], ["n0", "n1"], 8) == []
    other = {**node("n0").versions, "nccl": "2.28.1"}
    found = find_faults([node("n0"), node("n1"), node("n2", versions=other, commit="b" * 40)], ["n0", "n1", "n2"], 8)
    assert len(found) == 2
    assert found[0].startswith(f"commit differs between nodes: n2 has {'b' * 40}, the others {'a' * 40}")
    assert found[1].startswith("nccl differs between nodes: n2 has 2.28.1, the others 2.29.7")


def test_a_node_that_is_silent_counts_as_sound() -> None:
    said = "srun: error: task 1 launch failed\nslurmstepd: error: n1: execve(): python: No such file or directory"
    found = find_faults([node("n0")], ["n0", "n1"], 8, said)
    assert len(found) == 1 and found[0].startswith("n1: no report (slurmstepd: error: n1: execve(): python: No such")


def test_what_is_wrong_on_all_nodes_takes_a_line_each() -> None:
    ill = [node(name, problems=("EAOPD_STAGE is /x",), gpus=4) for name in ("n0", "n1")]
    found = find_faults(ill, ["n0", "n1"], 8)
    assert found == [
        "n0, n1: EAOPD_STAGE is /x",
        "n0: 4 GPUs, the job asks for 8",
        "n1: 4 GPUs, the job asks for 8",
    ]
    lines = preflight_report(ill).splitlines()
    assert [line.split()[0] for line in lines] == ["node", "n0", "n1"]
    assert lines[1].endswith("1 wrong") and "2.29.7" in lines[1] and "1024" in lines[1]


def test_a_gpu_that_another_works_on_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses a stand-in for nvidia-smi."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, 4'\necho '1, 61440'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert busy_gpus() == ["GPU 1 has 61440 MiB in use by another process: find it with nvidia-smi"]
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert busy_gpus() == []


# Models on the nodes' own disks


def test_half_a_model_is_taken_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stage = tmp_path / "model", tmp_path / "stage"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights").write_bytes(b"1" * 100)
    (stage / f".{staged_path(model, stage).name}.partial").mkdir(parents=True)  # of a killed job
    assert stage_model(model, stage) == staged_path(model, stage)
    assert sorted(path.name for path in staged_path(model, stage).iterdir()) == ["config.json", "weights"]
    (model / "config.json").unlink()
    assert (stage_model(model, stage) / "config.json").exists()  # it is not copied again


def test_a_full_disk_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"EAOPD_STAGE: .* has 0.0 GiB free"):
        stage_model(model, tmp_path / "stage")


# Why a step failed


def report(folder: Path, rank: int, message: str, when: float, *, user: bool = False, code: int = 1) -> None:
    record = {"message": message, "exit_code": code, "rank": rank, "user": user, "time": when}
    (folder / f"error.{rank}").write_text(json.dumps(record))


def test_the_highest_code_is_taken_for_the_failing_ranks(tmp_path: Path) -> None:
    """Rank 1 exits with 7; srun ends the others and returns 143 itself."""
    said = "srun: error: n0: task 1: Exited with exit code 7\nsrun: error: n0: tasks 0,2: Terminated\n"
    (tmp_path / "rank_1.log").write_text("\n".join(f"line {i}" for i in range(50)))
    found = failure_report(said, tmp_path, tmp_path, 143)
    assert (found.code, found.user) == (7, False)
    assert "error: rank 1 ended with exit code 7 on n0; the last lines of" in found.text
    assert found.text.count("\n") == 20 and found.text.endswith("line 49")


def test_a_rank_that_fell_with_another_is_blamed(tmp_path: Path) -> None:
    """Rank 2 reported its error first although srun saw rank 0 end earlier; a killed rank takes precedence."""
    report(tmp_path, 0, "rank 2 failed: boom", 20.0)
    report(tmp_path, 2, "boom", 10.0)
    said = "srun: error: n0: tasks 0-1: Exited with exit code 1\nsrun: error: n1: task 2: Exited with exit code 1\n"
    assert "rank 2 ended with exit code 1 on n1: boom" in failure_report(said, tmp_path, tmp_path, 1).text
    said = "srun: error: n1: task 3: Killed\n" + said
    found = failure_report(said, tmp_path, tmp_path, 1)
    assert found.code == 137 and "rank 3 was killed (Killed) on n1" in found.text


def test_a_wrong_recipe_is_started_again_and_again(tmp_path: Path) -> None:
    report(tmp_path, 1, "student.model: there is no folder", 10.0, user=True, code=2)
    found = failure_report("srun: error: n0: tasks 0-1: Exited with exit code 2\n", tmp_path, tmp_path, 2)
    assert (found.code, found.user) == (2, True)
    assert found.text == "error: student.model: there is no folder (rank 1, exit code 2)"


@pytest.mark.parametrize("code", [143, 138])
def test_ranks_that_saved_their_state_count_as_failed(tmp_path: Path, code: int) -> None:
    said = f"srun: error: n0: tasks 0-7: Exited with exit code {code}\n"
    assert failure_report(said, tmp_path, tmp_path, code).code == 0
    report(tmp_path, 0, "the disk is full", 10.0)
    assert failure_report(said, tmp_path, tmp_path, code).code == code
