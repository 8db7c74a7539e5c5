"""Kill the teacher's process tree at random moments of a Countdown run, and check that nothing changes.

    python tools/campaign_teacher.py [--kills N] [--seed N] [--iterations N] [--folder DIR] [KEY=VALUE ...]

The run is `eaopd train recipes/countdown/eopd.yaml teacher.placement=separate`, once undisturbed and once with kills
(SIGKILL to the launcher and its ranks) while the teacher is idle, scoring or starting, drawn from the seed. Both must
succeed with bit-identical metrics except for times, and with the same responses; a response token scored not at all, or
twice, ends a run with an error. Prints what was hit, writes report.json to --folder, and exits with 1 on a difference.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from eaopd_megatron.config import load_recipe  # noqa: E402
from tools.campaign_kills import RECIPE, STALLED_SECONDS, Run  # noqa: E402
from tools.lib.run_records import records  # noqa: E402

OPTIONS = (
    *("teacher.placement=separate", "train.prompts_per_iteration=24", "train.mini_batch=12"),
    *(
        "train.micro_batch_tokens=32",
        "run.log_rollouts=24",
        "run.save_interval=0",
        "evaluation.interval=0",
        "evaluation.problems=4",
    ),
    *("evaluation.samples=1", "reporting.tensorboard=false"),
)
"""One response per request: an iteration has many, and keeps the teacher busy for much of it."""
STARTING = 0.25
"""Fraction of the kills during a restart of the teacher; never two in a row, or the run would give it up."""
AIMED = 0.5
"""Fraction of the other kills that wait until it is busy."""
ITERATIONS = 2
"""Mean iterations per kill, including those until the next kill."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL to the process tree."""

    seconds: float  # since the run started
    iteration: int  # completed iterations
    processes: int
    phase: str  # "starting" | "idle" | "scoring"


class Victim:
    """The teacher's launcher with its ranks."""

    def __init__(self, top: psutil.Process) -> None:
        self.top = top
        self.tree = [top, *top.children(recursive=True)]

    @property
    def port(self) -> int:
        listen = next(word for word in self.top.cmdline() if word.startswith("teacher.listen="))
        return int(listen.rpartition(":")[2])

    @property
    def serves(self) -> bool:
        with suppress(OSError, psutil.Error, StopIteration), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def wait_until_busy(self, seconds: float) -> None:
        """Wait until its ranks use the processor in two successive clock ticks, at most `seconds`."""
        end, before, grown = time.monotonic() + seconds, self._used(), 0
        while grown < 2 and time.monotonic() < end:
            time.sleep(0.01)
            now = self._used()
            grown, before = (grown + 1 if now > before else 0), now

    def kill(self) -> None:
        for process in self.tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _used(self) -> float:
        total = 0.0
        for process in self.tree:
            with suppress(psutil.Error):
                total += sum(process.cpu_times()[:2])
        return total


def running_teacher(run: Run) -> Victim | None:
    """The running teacher of a run."""
    with suppress(psutil.Error):
        for process in psutil.Process(run.process.pid).children(recursive=True):  # parents come first
            with suppress(psutil.Error):
                if "teach" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    return Victim(process)
    return None


def until_serving(run: Run) -> Victim | None:
    """Wait until the teacher is ready; None if the run ends or stalls before."""
    end = time.monotonic() + STALLED_SECONDS
    while run.running and time.monotonic() < end:
        victim = running_teacher(run)
        if victim is not None and victim.serves:
            return victim
        time.sleep(0.1)
    return None


def unfinished(run: Run) -> int:
    """How often the run reported requests lost with the teacher."""
    return (run.folder / "output.txt").read_text(errors="replace").count("unfinished requests")


def kill_teacher(run: Run, count: int, numbers: random.Random) -> list[Kill]:
    kills: list[Kill] = []
    while len(kills) < count and run.until(0):
        starting = bool(kills) and kills[-1].phase != "starting" and numbers.random() < STARTING
        if starting:
            time.sleep(numbers.uniform(0.5, 4.0))
            victim = running_teacher(run)
        else:
            if until_serving(run) is None or not run.until(run.iterations + numbers.choice((0, 1, 1))):
                break
            time.sleep(numbers.uniform(0.0, 0.5))
            victim = until_serving(run)
            if victim is not None and numbers.random() < AIMED:
                victim.wait_until_busy(10.0)
        if victim is None:
            continue
        served, lost, iteration = victim.serves, unfinished(run), run.iterations
        victim.kill()
        time.sleep(0.3)  # until the run notices
        phase = "starting" if not served else "scoring" if unfinished(run) > lost else "idle"
        kills.append(Kill(round(time.monotonic() - run.started, 1), iteration, len(victim.tree), phase))
        print(f"kill {len(kills)} of {count}: {phase} after iteration {iteration}", flush=True)
    return kills


def differences(disturbed: Path, undisturbed: Path) -> list[str]:
    """Differences between two runs in metrics (except times) and responses."""
    disturbed_records, undisturbed_records = records(disturbed), records(undisturbed)
    found = []
    if len(disturbed_records) != len(undisturbed_records):
        found.append(f"{len(disturbed_records)} records of metrics, not {len(undisturbed_records)}")
    for ours, other in zip(disturbed_records, undisturbed_records, strict=False):
        for name in sorted(ours.keys() | other.keys()):
            if json.dumps(ours.get(name)) != json.dumps(other.get(name)):
                found.append(f"iteration {other['iteration']}: {name} is {ours.get(name)}, not {other.get(name)}")
    names = sorted({path.name for folder in (disturbed, undisturbed) for path in (folder / "rollouts").iterdir()})
    for name in names:
        texts = [
            path.read_bytes() if (path := f / "rollouts" / name).exists() else b"" for f in (disturbed, undisturbed)
        ]
        if texts[0] != texts[1]:
            found.append(f"the responses in rollouts/{name} differ")
    return found


def campaign(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the campaign and return the report, whose `problems` list the differences."""
    iterations = arguments.iterations or ITERATIONS * (arguments.kills + 1)
    shared = (*OPTIONS, f"seed={arguments.seed}", f"train.iterations={iterations}", *arguments.overrides)

    def begin(name: str) -> Run:
        overrides = [*shared, f"run.folder={arguments.folder / name}"]
        return Run(overrides, load_recipe(RECIPE, overrides), None)

    def end(run: Run) -> float:
        run.until(iterations)
        if run.process.wait(STALLED_SECONDS) != 0:
            raise SystemExit(f"error: the run in {run.folder} failed: {run.output()}")
        return round(time.monotonic() - run.started, 1)

    with begin("killed") as killed:
        kills = kill_teacher(killed, arguments.kills, random.Random(arguments.seed))
        seconds = end(killed)
    with begin("undisturbed") as undisturbed:
        quiet_seconds = end(undisturbed)
    problems = differences(killed.folder, undisturbed.folder)
    if len(kills) < arguments.kills:
        problems.append(f"only {len(kills)} of {arguments.kills} kills before the run ended: give --iterations")
    return {
        "seed": arguments.seed,
        "iterations": iterations,
        "seconds": seconds,
        "undisturbed_seconds": quiet_seconds,
        "kills": [asdict(kill) for kill in kills],
        "phases": dict(Counter(kill.phase for kill in kills)),
        "problems": problems,
    }


def show(report: dict[str, Any]) -> None:
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(report["phases"].items()))
    times = f"{report['seconds']:g} s, undisturbed {report['undisturbed_seconds']:g} s"
    print(f"{len(report['kills'])} kills ({phases}) in {report['iterations']} iterations: {times}")
    for problem in report["problems"]:
        print(f"DIFFERS: {problem}")
    if not report["problems"]:
        print("every metric and every response equals that of the undisturbed run, bit for bit")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, help="of the run; by default as many as the kills take")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/campaign_teacher")
    parser.add_argument("overrides", nargs="*", help="more settings of the recipe")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    report = campaign(arguments)
    (arguments.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    raise SystemExit(1 if report["problems"] else 0)


if __name__ == "__main__":
    main()
