"""The repository's own scripts, submitted with a short Countdown run on CPUs through a site's file."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
NONE: Mapping[str, str] = MappingProxyType({})
SHORT = (
    "student.tensor_parallel=1 train.iterations=60 train.prompts_per_iteration=16 train.mini_batch=8 "
    "optimizer.warmup_updates=2 run.save_interval=2 evaluation.benchmarks=[] run.log_rollouts=1 "
    "reporting.tensorboard=false"
)


@dataclass
class Site:
    """folder: shared by the nodes; runs are below it. more: lines of the site's file."""

    cluster: Cluster
    folder: Path
    more: dict[str, str] = field(default_factory=dict)

    def submit(
        self, script: str, *arguments: str, changes: Mapping[str, str] = NONE, options: Sequence[str] = ()
    ) -> Job:
        """sbatch slurm/SCRIPT ARGUMENTS. changes: variables of the site's file; '' leaves one out."""
        variables = {
            "EAOPD_SHARED": str(self.folder),
            "EAOPD_VENV": sys.prefix,
            "EAOPD_RECIPE": "recipes/countdown/eopd.yaml",
            "EAOPD_OVERRIDES": SHORT,
            "EAOPD_RANKS_PER_NODE": "1",
            "EAOPD_PREFLIGHT": "no",
            "EAOPD_INTERFACE": "lo",
            **self.more,
            **changes,
        }
        number = len(list(self.folder.glob("site-*.env")))
        file = self.folder / f"site-{number}.env"
        file.write_text("".join(f'{name}="{value}"\n' for name, value in variables.items() if value))
        out = self.folder / f"job-{number}.txt"
        # the file alone is to say what the site is like
        others = [part for name in os.environ if name.startswith("EAOPD_") for part in ("-u", name)]
        submit = ("env", *others, f"EAOPD_SITE={file}", "sbatch", "--parsable", "--output", str(out))
        said = self.cluster.run(*submit, *options, f"slurm/{script}", *arguments, cwd=ROOT)
        return Job(self.cluster, int(said), out, self.folder / "runs/countdown-eopd")


@dataclass
class Job:
    """A submitted one. folder: the run's, unless an override names another."""

    cluster: Cluster
    number: int
    out: Path
    folder: Path

    @property
    def output(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    @property
    def own_folder(self) -> Path:
        """The job's part of the run's."""
        return self.folder / "cluster" / f"job_{self.number}"

    def finish(self, seconds: float = 300) -> str:
        """How it ended, such as COMPLETED 0:0."""
        state = self.cluster.finish(self.number, seconds)
        return f"{state} {self.cluster.job(self.number)['ExitCode']}"

    def wait_for(self, pattern: str, seconds: float = 300) -> re.Match[str]:
        """Until its output says so. Raises AssertionError, with the output, where it ends without."""

        self._await(lambda: re.search(pattern, self.output) is not None, seconds, f"say {pattern}")
        found = re.search(pattern, self.output)
        assert found
        return found

    def wait_for_iteration(self, least: int = 3) -> None:
        """Until the run has recorded so many."""
        rollouts = self.folder / "rollouts" / f"{least:06d}.jsonl"
        self._await(rollouts.exists, 300, f"be at iteration {least}")

    def _await(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Asks Slurm, which is slow, now and then only."""
        deadline = asked = time.monotonic()
        deadline += seconds
        while not condition():
            now = time.monotonic()
            assert now < deadline, f"waited {seconds:g} s for job {self.number} to {what}: {self.output[-2000:]}"
            if now - asked > 2:
                asked = now
                alive = self.cluster.state(self.number) in ("PENDING", "RUNNING")
                assert alive or condition(), f"job {self.number} ended and did not {what}: {self.output[-2000:]}"
            time.sleep(0.05)

    def release(self) -> None:
        """Once it is requeued, it starts at once, not after the two minutes that Slurm lets it wait."""
        self.cluster.wait(lambda: self.cluster.state(self.number) == "PENDING", 60, "the job to be requeued")
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
