"""Fixtures: a one-machine Slurm cluster for the whole session, and the environment of its jobs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Site
from tools.sglang_double.student import stand_in

COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "shellcheck")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        lacks = f"{', '.join(missing)} not installed" if missing else "the tests are not run by root"
        pytest.skip(f"no one-machine Slurm cluster: {lacks}")
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster", nodes=5) as cluster:
        yield cluster


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Site:
    return Site(cluster, tmp_path)


@pytest.fixture(scope="session")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment in which a stand-in serves the student in SGLang's place."""
    return stand_in(tmp_path_factory.mktemp("doubles"))
