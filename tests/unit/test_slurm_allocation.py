"""Assignment of roles to a job's nodes, and the scripts' dry runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.slurm_job.allocate import Allocation, JobNodes, StepPlan, allocate

ROOT = Path(__file__).resolve().parents[2]
COUNTDOWN = str(ROOT / "recipes/countdown/eopd.yaml")
THREE = JobNodes(1, 1, 1, ("n0", "n1", "n2"), gpus=8, per_node={})


@pytest.fixture(autouse=True)
def no_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep runs of the checkout and variables of a site out of the tests."""
    for name in ("EAOPD_MODELS", "EAOPD_STAGE", "EAOPD_PORTS", "EAOPD_INTERFACE", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EAOPD_SHARED", str(tmp_path))


def allocated(nodes: JobNodes, *overrides: str) -> Allocation:
    return allocate(COUNTDOWN, overrides, nodes)


def test_gpus_of_a_node_lie_idle_or_are_given_twice() -> None:
    steps = allocated(THREE, "servers.tensor_parallel=2", "teacher.tensor_parallel=2").steps
    assert steps == (
        StepPlan("student", ("n0",), 8),
        *(StepPlan(f"teacher_{i}", ("n1",), 2, (2 * i, 2)) for i in range(4)),
        *(StepPlan(f"server_{i}", ("n2",), 1, (2 * i, 2)) for i in range(4)),
    )


def test_services_of_the_second_node_are_placed_on_the_first() -> None:
    """Without GPUs the site sets the number of ranks and services per node."""
    nodes = JobNodes(1, 2, 2, ("a", "b", "c", "d", "e"), gpus=0, per_node={"student": 2, "teacher": 1, "servers": 2})
    steps = allocated(nodes).steps
    assert [step.words() for step in steps] == ["a 2", "b 1", "c 1", "d 1", "d 1", "e 1", "e 1"]
    assert [step.name for step in steps[3:]] == [f"server_{i}" for i in range(4)]


def test_a_replica_over_two_nodes_is_taken_for_two() -> None:
    nodes = JobNodes(1, 4, 0, ("n0", "n1", "n2", "n3", "n4"), gpus=8, per_node={})
    steps = allocated(
        nodes, "teacher.model=Qwen/Qwen3-8B", "teacher.tensor_parallel=8", "teacher.pipeline_parallel=2"
    ).steps
    assert steps[1:] == (StepPlan("teacher_0", ("n1", "n2"), 8), StepPlan("teacher_1", ("n3", "n4"), 8))


def test_a_recipe_for_half_a_node_fills_it() -> None:
    nodes = JobNodes(1, 0, 0, ("n0",), gpus=8, per_node={})
    assert allocated(nodes, "student.data_parallel=2").steps == (StepPlan("student", ("n0",), 4),)


@pytest.mark.parametrize(
    ("nodes", "overrides", "said"),
    [
        (
            replace(THREE, names=("n0", "n1")),
            [],
            "the script's roles take 3 nodes (student 1, teacher 1, servers 1), the",
        ),
        (replace(THREE, gpus=0), [], "the job's nodes have no GPUs"),
        (replace(THREE, gpus=3), [], "the student's layout takes a multiple of 2 ranks, its nodes have 1 x 3"),
        (THREE, ["student.data_parallel=8"], "takes 16 ranks with student.data_parallel=8, its nodes have 1 x 8"),
        (THREE, ["teacher.tensor_parallel=3"], "a replica of the teacher takes 3 GPUs, its nodes have 1 x 8"),
        (THREE, ["teacher.tensor_parallel=16"], "a replica of the teacher takes 16 GPUs, its nodes have 1 x 8"),
        (THREE, ["servers.tensor_parallel=3"], "servers.tensor_parallel=3 GPUs, which does not divide the 8"),
    ],
)
def test_gpus_that_do_not_match_the_layout_are_found_by_a_hanging_job(
    nodes: JobNodes, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError) as error:
        allocated(nodes, *overrides)
    assert said in str(error.value)


def test_the_run_lies_where_only_one_node_sees_it(tmp_path: Path) -> None:
    assert allocated(THREE).folder == tmp_path / "runs/countdown-eopd"
    assert allocated(THREE, "run.folder=mine").folder == tmp_path / "mine"
    assert "run.folder=" + str(tmp_path / "mine") in allocated(THREE, "run.folder=mine").overrides


def test_a_missing_model_is_found_after_the_servers_have_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "models/Qwen3-4B-Base").mkdir(parents=True)
    (tmp_path / "models/Qwen3-4B-Base/config.json").write_text("{}")
    monkeypatch.setenv("EAOPD_MODELS", str(tmp_path / "models"))
    recipe = str(ROOT / "recipes/qwen3/4b_from_8b.yaml")
    with pytest.raises(UserError, match=r"teacher.model is Qwen/Qwen3-8B, but EAOPD_MODELS has neither"):
        allocate(recipe, [], THREE)
    (tmp_path / "models/Qwen/Qwen3-8B").mkdir(parents=True)
    (tmp_path / "models/Qwen/Qwen3-8B/config.json").write_text("{}")
    found = allocate(recipe, [], THREE)
    assert found.models == (str(tmp_path / "models/Qwen3-4B-Base"), str(tmp_path / "models/Qwen/Qwen3-8B"))


def test_a_hub_id_is_copied_to_the_nodes_as_if_it_were_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EAOPD_STAGE", str(tmp_path / "stage"))
    with pytest.raises(UserError, match=r"student.model is Qwen/Qwen3-4B-Base: EAOPD_STAGE copies folders"):
        allocate(str(ROOT / "recipes/qwen3/4b_from_8b.yaml"), [], THREE)
    student, teacher = allocated(THREE).staged
    assert student.startswith(f"student.model={tmp_path}/stage/student-")
    assert teacher.startswith(f"teacher.model={tmp_path}/stage/teacher-")


def test_bash_reads_other_words_than_were_said() -> None:
    found = allocated(THREE, "data.suffix=a 'b' $c")
    echo = 'printf "%s\\n" "${allocated_overrides[@]}" "${allocated_services[*]}" "${allocated_steps[server_1]}"'
    read = subprocess.run(["bash", "-c", f"{found.render()}\n{echo}"], capture_output=True, text=True, check=True)
    *overrides, services, server = read.stdout.splitlines()
    assert overrides == list(found.overrides) and server == "n2 1 1:1"
    assert services.split() == [f"{kind}_{i}" for kind in ("teacher", "server") for i in range(8)]


# Dry runs: the scripts themselves, outside a job


def dry_run(script: str, *arguments: str, shared: Path) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "EAOPD_"))}
    site = {"EAOPD_SITE": "/dev/null", "EAOPD_SHARED": str(shared), "EAOPD_VENV": sys.prefix}
    command = ["bash", f"slurm/{script}", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=outside | site, capture_output=True, text=True)


def test_a_dry_run_starts_something_or_prints_other_steps_than_the_job_has(tmp_path: Path) -> None:
    done = dry_run("qwen3_4b.sh", "train.iterations=3", shared=tmp_path)
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir()), done
    assert "dry run on node1 node2 node3: nothing is started" in done.stdout
    steps = [line for line in done.stdout.splitlines() if " srun " in f" {line}"]
    names = ["student", *(f"{kind}_{i}" for kind in ("teacher", "server") for i in range(8))]
    assert [re.findall(r"--name (\S+)", step) for step in steps] == [[name] for name in (*names[1:], names[0])]
    assert all("train.iterations=3" in step and "--gpus-per-node=8" in step for step in steps)
    assert "--nodelist=node2 --ntasks=1 " in steps[3] and "--gpus 3:1 " in steps[3] and " teach " in steps[3]
    assert "--nodelist=node3 --ntasks=1 " in steps[8] and "--gpus 0:1 " in steps[8] and " serve " in steps[8]
    assert "--nodelist=node1 --ntasks=8 " in steps[16] and "teacher.urls=" in steps[16] and "servers.urls=" in steps[16]


def test_a_dry_run_takes_a_recipe_that_the_job_refuses(tmp_path: Path) -> None:
    done = dry_run("qwen3_4b.sh", "teacher.tensor_parallel=3", shared=tmp_path)
    assert done.returncode == 1 and "srun" not in done.stdout
    assert done.stderr.startswith("error: a replica of the teacher takes 3 GPUs, its nodes have 1 x 8")


def test_a_dry_run_of_a_tool_runs_it(tmp_path: Path) -> None:
    done = dry_run("evaluate.sh", "some/model", shared=tmp_path)
    assert done.returncode == 0 and "-m eaopd_megatron evaluate some/model" in done.stdout, done


def test_a_script_that_is_run_outside_a_job_does_not_say_how_to_submit_it() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(["bash", "slurm/qwen3_4b.sh"], cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode == 1 and "submit it with sbatch, or add --dry-run" in done.stderr
