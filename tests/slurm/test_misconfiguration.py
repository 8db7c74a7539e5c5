"""A misconfigured site is reported in one line before anything starts."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from tests.slurm.jobs import Site

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(180)]


def errors(site: Site, changes: Mapping[str, str], script: str = "qwen3_0.6b.sh", *options: str) -> list[str]:
    """Return a failed job's output lines without its progress messages."""
    job = site.submit(script, changes=changes, options=options)
    assert job.finish(120).startswith("FAILED"), job.output
    return [line for line in job.output.splitlines() if not line.startswith("[job]")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"EAOPD_SHARED": "/nowhere"}, r"error: EAOPD_SHARED is /nowhere, which is not a folder on n\d"),
        ({"EAOPD_VENV": "/nowhere"}, r"error: /nowhere/bin/python is not there: make the environment"),
        ({"EAOPD_CONTAINER": "docker"}, r"error: EAOPD_CONTAINER is docker; allowed: none, pyxis, apptainer"),
        ({"EAOPD_CONTAINER": "pyxis"}, r"error: EAOPD_CONTAINER is pyxis and EAOPD_IMAGE is not set"),
        (
            {"EAOPD_CONTAINER": "apptainer", "EAOPD_IMAGE": "/nowhere.sif"},
            r"error: EAOPD_IMAGE is /nowhere.sif, which is not there: build it",
        ),
        ({"EAOPD_STAGE": "$SCRATCH_OF_NOBODY/me"}, r"site-\d+.env: line \d+: SCRATCH_OF_NOBODY: unbound variable"),
        (
            {"EAOPD_MODELS": "/nowhere", "EAOPD_RECIPE": "recipes/qwen3/4b_from_8b.yaml", "EAOPD_OVERRIDES": ""},
            r"error: student.model is Qwen/Qwen3-4B-Base, but EAOPD_MODELS has neither /nowhere/Qwen/Qwen3-4B-B",
        ),
        (
            {"EAOPD_RANKS_PER_NODE": "3", "EAOPD_OVERRIDES": ""},
            r"error: the student's layout takes a multiple of 2 ranks",
        ),
    ],
    ids=["folder", "environment", "container", "unset image", "image", "unset variable", "model", "layout"],
)
def test_a_fault_of_the_site_is_told_in_a_page(site: Site, changes: dict[str, str], said: str) -> None:
    lines = errors(site, changes)
    assert len(lines) == 1 and re.search(said, lines[0]), lines


@contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_nodes_are_not_looked_at(site: Site) -> None:
    """One table, and one line per fault: the second node has another folder under the run folder's name, every port is
    taken, and the staging folder is missing on the nodes' disks."""
    local = site.folder / "local"
    local.mkdir()
    site.cluster.kill_node("n1")
    site.cluster.start_node("n1", hidden=local)
    try:
        with listening() as port:
            changes = {
                **{"EAOPD_PREFLIGHT": "", "EAOPD_SHARED": str(local), "EAOPD_SERVERS_PER_NODE": "1"},
                **{"EAOPD_PORTS": f"{port}-{port}", "EAOPD_STAGE": str(local / "none")},
            }
            lines = errors(site, changes, "qwen3_1.7b.sh", "--nodelist=n0,n1")
    finally:
        site.cluster.kill_node("n1")
        site.cluster.start_node("n1")
    table, faults = lines[:3], lines[3:]
    assert table[0].split()[:3] == ["node", "address", "python"]
    assert re.match(r"n0 .*0\.16\.1.*2 wrong", table[1]) and re.match(r"n1 .*0\.16\.1.*3 wrong", table[2])
    run = local / "runs/countdown-eopd"
    assert sorted(faults) == [
        f"error: n0, n1: EAOPD_STAGE is {local}/none, which is not a writable folder",
        f"error: n0, n1: every port of EAOPD_PORTS={port}-{port} is taken on 127.0.0.1: name others",
        f"error: n1: {run} is not the folder that the job's first node sees: set EAOPD_SHARED to a shared one",
    ]
