"""Every script parses in bash, passes shellcheck, and has directives that Slurm accepts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from eaopd_megatron.slurm_job import ROLES
from eaopd_megatron.slurm_job.allocate import JobNodes, allocate
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
LIBRARY = sorted((ROOT / "slurm/lib").glob("*.sh"))
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]


def test_scripts_have_faults_that_only_a_run_would_find(cluster: Cluster) -> None:
    for script in [*SCRIPTS, *LIBRARY]:
        cluster.run("bash", "-n", str(script))
    cluster.run("shellcheck", "-x", *map(str, [*SCRIPTS, ROOT / "slurm/container/install.sh"]), cwd=ROOT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_slurm_refuses_a_script(cluster: Cluster, script: Path) -> None:
    said = cluster.run("sbatch", "--test-only", f"slurm/{script.name}", cwd=ROOT)
    assert re.search(r"Job \d+ to start at .* on nodes n", said)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_directive_is_silently_ignored(script: Path) -> None:
    """sbatch reads directives up to the first command only; a script fits on one screen."""
    lines = script.read_text().splitlines()
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert all(not line.startswith("#SBATCH") for line in lines[commands[0] :])
    assert len(lines) <= 25


def roles(script: Path) -> tuple[str, dict[str, int], list[str]]:
    """Return the recipe, the nodes per role, and the overrides that a script names."""
    text = script.read_text()
    line = next(line for line in text.splitlines() if line.startswith("distil "))
    words = subprocess.run(["bash", "-c", f"set --; echo {line}"], capture_output=True, text=True).stdout.split()
    given, overrides = words[2 : words.index("--")], words[words.index("--") + 1 :]
    return words[1], {name: int(count) for name, _, count in (one.partition("=") for one in given)}, overrides


@pytest.mark.parametrize(
    "script", [script for script in SCRIPTS if "distil " in script.read_text()], ids=lambda script: script.name
)
def test_the_nodes_of_a_script_do_not_carry_its_recipe(
    script: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EAOPD_SHARED", str(tmp_path))
    recipe, given, overrides = roles(script)
    asked = re.search(r"^#SBATCH --nodes=(\d+)$", script.read_text(), re.MULTILINE)
    assert asked
    student, teacher, servers = (given.get(role, 0) for role in ROLES)
    names = tuple(f"n{i}" for i in range(int(asked[1])))
    nodes = JobNodes(student, teacher, servers, names, gpus=8, per_node={})
    allocate(str(ROOT / recipe), overrides, nodes)
