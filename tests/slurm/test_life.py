"""Life cycles of jobs, with the real scripts: roles over nodes, dead services and nodes, preemption, time limits."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, Site
from tools.lib.run_records import records

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
ONE_NODE = "qwen3_0.6b.sh"
ROLES = {"EAOPD_TEACHERS_PER_NODE": "1", "EAOPD_SERVERS_PER_NODE": "1"}


def finished(job: Job) -> bool:
    return (job.folder / "finished.json").exists()


def running(*words: str) -> list[psutil.Process]:
    """Return the processes whose command line contains these words."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if all(word in " ".join(one.info["cmdline"] or []) for word in words)]


def variable(process: psutil.Process, name: str) -> str | None:
    """Return a variable of a process's environment; None if it is unset or the process has ended."""
    with contextlib.suppress(psutil.Error):
        value: str | None = process.environ().get(name)
        return value
    return None


def test_student_teacher_and_servers_do_not_find_each_other(site: Site, doubles: Path) -> None:
    """Three nodes pass the preflight, models are staged on their own disks, and a killed server is restarted."""
    stage = site.folder / "own_disk"  # of every node
    stage.mkdir()
    site.more = {**ROLES, "EAOPD_SGLANG_VENV": str(doubles), "EAOPD_PREFLIGHT": "", "EAOPD_PROBE": "yes"}
    site.more["EAOPD_STAGE"] = str(stage)
    job = site.submit("qwen3_4b.sh", "train.iterations=12")
    job.wait_for_iteration(2)
    key = (job.own_folder / "key").read_text().strip()
    assert oct((job.own_folder / "key").stat().st_mode & 0o777) == "0o600" and len(key) > 20
    servers = running("tools.sglang_double.student")
    (server,) = [one for one in servers if variable(one, "EAOPD_SHARED") == str(site.folder)]
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if key in command]
    server.kill()

    assert job.finish() == "COMPLETED 0:0", job.output
    assert finished(job)
    assert len([record for record in records(job.folder) if "objective/loss" in record]) == 12
    assert "server_0 died and is started again: error: the rollout server at http://127.0.0.1" in job.output
    assert "gloo: 1 ranks reach each other" in job.output
    config = (job.folder / "config.yaml").read_text()
    staged = [folder for folder in stage.iterdir() if folder.is_dir()]
    assert len(staged) == 2 and all(f"model: {folder}\n" in config for folder in staged), config
    table = [line.split() for line in job.output.splitlines() if line.startswith("n")]
    assert [(row[0], row[-1]) for row in table[1:]] == [(f"n{i}", "ok") for i in range(3)]
    assert not [log for log in job.folder.rglob("*") if log.is_file() and key in log.read_text(errors="replace")]
    assert not running(f"--folder {job.own_folder}")
    assert not (job.own_folder / "key").exists()


# Jobs on a node each, at the same time


@pytest.fixture(scope="module")
def lives(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[list[Job]]]]:
    """Return the finished jobs of each scenario by its name."""
    plots = {"whole": _whole, "preempted": _preempted, "orphan": _orphan, "chain": _chain}
    with ThreadPoolExecutor(len(plots)) as pool:
        yield {name: pool.submit(plot, Site(cluster, tmp_path_factory.mktemp(name))) for name, plot in plots.items()}


def _whole(site: Site) -> list[Job]:
    job = site.submit(ONE_NODE)
    job.finish()
    return [job]


def _preempted(site: Site) -> list[Job]:
    """Slurm preempts the job for a more urgent one."""
    job = site.submit(ONE_NODE)
    job.wait_for_iteration()
    node = site.cluster.job(job.number)["NodeList"]
    urgent = ("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=true")
    number = int(site.cluster.run("sbatch", "--parsable", *urgent))
    job.release()
    site.cluster.finish(number)
    job.finish()
    return [job]


def _orphan(site: Site) -> list[Job]:
    """The job's node dies; the job continues on another one."""
    job = site.submit(ONE_NODE)
    job.wait_for_iteration(8)  # checkpoints are written beside the training: by now there is one
    node = site.cluster.job(job.number)["NodeList"]
    site.cluster.kill_node(node)
    job.release()
    job.finish()
    site.cluster.start_node(node)
    return [job]


def _chain(site: Site) -> list[Job]:
    """The first job's time limit is shortened, and its trainer is suspended until Slurm warns that time runs out."""
    options = ("--time=60", "--signal=B:USR1@120", "--job-name=chain", "--dependency=singleton")
    jobs = [site.submit(ONE_NODE, options=options, changes={"EAOPD_REQUEUE": "no"}) for _ in range(3)]
    jobs[0].wait_for_iteration()
    trainers = running("eaopd_megatron train", str(site.folder))
    for trainer in trainers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(trainer.pid, signal.SIGSTOP)
    try:
        minutes = sum(60**i * int(part) for i, part in enumerate(reversed(_run_time(jobs[0]).split(":")))) // 60
        site.cluster.run("scontrol", "update", f"JobId={jobs[0].number}", f"TimeLimit={minutes + 2}")
        jobs[0].wait_for("SIGUSR1: the trainer saves")
    finally:
        for trainer in trainers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer.pid, signal.SIGCONT)
    for job in jobs:
        job.finish()
    return jobs


def _run_time(job: Job) -> str:
    """Return the job's run time as HH:MM:SS."""
    return job.cluster.job(job.number)["RunTime"]


def same(job: Job, whole: Job) -> bool:
    return records(job.folder) == records(whole.folder)


def test_a_run_on_one_node_does_not_end(lives: dict[str, Future[list[Job]]]) -> None:
    (job,) = lives["whole"].result()
    assert job.finish() == "COMPLETED 0:0", job.output
    assert finished(job) and [r["iteration"] for r in records(job.folder) if "objective/loss" in r] == [*range(1, 61)]


@pytest.mark.parametrize("life", ["preempted", "orphan"])
def test_a_job_that_loses_its_node_loses_its_state(lives: dict[str, Future[list[Job]]], life: str) -> None:
    """The requeued job's metrics equal the undisturbed job's bit for bit."""
    (job,), (whole,) = lives[life].result(), lives["whole"].result()
    assert job.finish() == "COMPLETED 0:0", job.output
    assert site_restarts(job) >= 1 and "continuing after iteration" in job.output
    assert finished(job) and same(job, whole)


def test_a_chain_of_short_jobs_ends_elsewhere_than_a_long_one(lives: dict[str, Future[list[Job]]]) -> None:
    chain, (whole,) = lives["chain"].result(), lives["whole"].result()
    assert [job.finish() for job in chain] == ["COMPLETED 0:0"] * 3, chain[0].output
    assert "the next job goes on" in chain[0].output and "continuing after iteration" in chain[1].output
    assert "this run is finished" in chain[2].output
    assert finished(chain[0]) and same(chain[0], whole)


def site_restarts(job: Job) -> int:
    return int(job.cluster.job(job.number)["Restarts"])


# Ends


def test_a_crash_is_repeated_for_ever(site: Site) -> None:
    """A rank that always dies is restarted once; then its exit code and its last log lines end the job."""
    two = {"EAOPD_RANKS_PER_NODE": "2", "EAOPD_RESTARTS": "1"}
    job = site.submit(ONE_NODE, "student.tensor_parallel=2", changes=two)
    killed: list[int] = []
    while len(killed) < 2:
        trainers = running("eaopd_megatron train", str(site.folder))
        for rank in [one for one in trainers if variable(one, "RANK") == "1" and one.pid not in killed]:
            rank.kill()
            killed.append(rank.pid)
        assert site.cluster.state(job.number) in ("PENDING", "RUNNING"), job.output
        time.sleep(0.5)
    assert job.finish() == "FAILED 137:0", job.output
    assert job.output.count("error: rank 1 was killed (Killed) on n") == 2
    assert "error: 2 starts without a new checkpoint (newest: none): not started again" in job.output


def test_a_cancelled_job_comes_back(site: Site) -> None:
    job = site.submit(ONE_NODE)
    job.wait_for("looking|loading|job")
    site.cluster.run("scancel", str(job.number))
    assert job.finish().startswith("CANCELLED")


def test_a_wrong_recipe_is_started_again(site: Site) -> None:
    """A user error ends the job at once, with its one line and its exit code."""
    job = site.submit(ONE_NODE, "data.max_prompt_tokens=1")
    assert job.finish() == "FAILED 1:0", job.output
    assert job.output.count("error: ") == 1 and "is started again" not in job.output
