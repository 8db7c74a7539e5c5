"""Submit the repository's scripts with a short Countdown run on CPUs, configured by a site file."""

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
    """A site. folder: shared by the nodes, contains the runs. more: further lines of the site file."""

    cluster: Cluster
    folder: Path
    more: dict[str, str] = field(default_factory=dict)

    def submit(
        self, script: str, *arguments: str, changes: Mapping[str, str] = NONE, options: Sequence[str] = ()
    ) -> Job:
        """Run `sbatch slurm/SCRIPT ARGUMENTS`. changes: variables of the site file; '' removes one."""
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
    """A submitted job. folder: the run's, unless an override names another."""

    cluster: Cluster
    number: int
    out: Path
    folder: Path

    @property
    def output(self) -> str:
        return self.out.read_text() if self.out.exists() else ""

    @property
    def own_folder(self) -> Path:
        """Return the job's subfolder of the run's folder."""
        return self.folder / "cluster" / f"job_{self.number}"

    def finish(self, seconds: float = 300) -> str:
        """Wait for the job and return how it ended, such as COMPLETED 0:0."""
        state = self.cluster.finish(self.number, seconds)
        return f"{state} {self.cluster.job(self.number)['ExitCode']}"

    def wait_for(self, pattern: str, seconds: float = 300) -> re.Match[str]:
        """Wait for a pattern in the output. Raises AssertionError, with the output, if the job ends without it."""

        self._await(lambda: re.search(pattern, self.output) is not None, seconds, f"say {pattern}")
        found = re.search(pattern, self.output)
        assert found
        return found

    def wait_for_iteration(self, least: int = 3) -> None:
        """Wait until the run has recorded this many iterations."""
        rollouts = self.folder / "rollouts" / f"{least:06d}.jsonl"
        self._await(rollouts.exists, 300, f"be at iteration {least}")

    def _await(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Poll a condition; ask Slurm, which is slow, less often."""
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
        """Start a requeued job immediately instead of after Slurm's delay of two minutes."""
        self.cluster.wait(lambda: self.cluster.state(self.number) == "PENDING", 60, "the job to be requeued")
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
