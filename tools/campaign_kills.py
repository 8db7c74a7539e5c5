"""Kill rollout servers at random moments of a Countdown run, and check that the run loses nothing.

    python tools/campaign_kills.py [--kills N] [--real] [--seed N] [--iterations N] [--references N] [KEY=VALUE ...]

The run is `eaopd train recipes/countdown/eopd.yaml rollout.engine=sglang` with two servers, by default doubles that
hold a real student, and takes as many iterations as the kills need. The seed determines when to kill, which server, and
whether to aim at a weight update. Every iteration must have trained each of its prompts once, on responses of the right
weights, and the final metrics must equal those of undisturbed runs with other seeds (--references of them) up to noise.
Prints a table, writes report.json to --folder, and exits with 1 if something was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import subprocess
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

from eaopd_megatron.config import Recipe, load_recipe  # noqa: E402
from eaopd_megatron.rollout.sglang.server import SGLANG_VENV_VARIABLE  # noqa: E402
from tools.campaign_checks import check_metrics, check_prompts, compare, final_metrics, prompts_of  # noqa: E402
from tools.sglang_double.student import stand_in  # noqa: E402

RECIPE = ROOT / "recipes/countdown/eopd.yaml"
PROGRAMS = ("sglang.launch_server", "tools.sglang_double.student")
SERVES = re.compile(r"^http://|Uvicorn running on")
"""Matches the line of a server's log, double or real, that says it is ready."""
AIMED = 0.3
"""Fraction of the kills that wait for a weight update, which is short."""
ANY = 0.15
"""Fraction of the kills that may hit a starting server; one that dies too often while starting is given up."""
SPACING = {False: 5, True: 40}
"""Mean iterations between two kills; a real server takes half a minute to restart."""
STALLED_SECONDS = 300.0
"""A run without progress for this long has failed."""
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    seconds: float  # since the run started
    iteration: int  # completed iterations
    server: str  # name of its log
    pid: int
    phase: str  # "starting" | "idle" | "generating" | "updating"; of a real server according to its log
    aimed: bool  # at a weight update


class Run:
    """`eaopd train` as a process. A context manager that terminates it."""

    def __init__(self, overrides: Sequence[str], recipe: Recipe, servers: Path | None) -> None:
        """servers: an environment to use in place of SGLang's."""
        self.folder, self.started = Path(recipe.run.folder), time.monotonic()
        if self.folder.exists():
            raise SystemExit(f"error: {self.folder} exists: give another --folder")
        self.folder.mkdir(parents=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}
        if servers is not None:
            environment[SGLANG_VENV_VARIABLE] = str(servers)
        with (self.folder / "output.txt").open("w") as output:
            command = [sys.executable, "-m", "eaopd_megatron", "train", str(RECIPE), *overrides]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def iterations(self) -> int:
        """Completed iterations; -1 before the first evaluation."""
        with suppress(OSError):
            return (self.folder / "metrics.jsonl").read_bytes().count(b"\n") - 1
        return -1

    def until(self, iterations: int) -> bool:
        """Wait for so many completed iterations; return False if the run ends before. Raise SystemExit if it stalls."""
        last, since = self.iterations, time.monotonic()
        while last < iterations and self.running:
            time.sleep(POLL_SECONDS)
            if (now := self.iterations) != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > STALLED_SECONDS:
                raise SystemExit(f"error: no iteration after {last} within {STALLED_SECONDS:g} s: {self.output()}")
        return last >= iterations

    def output(self) -> str:
        return " | ".join((self.folder / "output.txt").read_text(errors="replace").splitlines()[-3:])

    def starts(self) -> int:
        """How often a server became ready."""
        logs = self.folder.glob("servers/server_*.log")
        return sum(SERVES.search(line) is not None for log in logs for line in _text(log).splitlines())

    def servers(self) -> list[ServerProcess]:
        """The running servers, without their child processes."""
        found = []
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    command, above = process.cmdline(), process.parent()
                    its_child = above is not None and _is_server(above.cmdline())
                    if _is_server(command) and not its_child and process.status() != psutil.STATUS_ZOMBIE:
                        port = int(command[command.index("--port") + 1])
                        found.append(ServerProcess(process, port, self.folder / "servers"))
        return sorted(found, key=lambda server: server.port)


def _is_server(command: Sequence[str]) -> bool:
    return any(program in command for program in PROGRAMS)


class ServerProcess:
    """A running server, and its state according to its log."""

    def __init__(self, process: psutil.Process, port: int, logs: Path) -> None:
        self.process, self.port = process, port
        mine = (log for log in sorted(logs.glob("server_*.log")) if re.search(rf"\b{port}\b", _text(log)))
        self.log = next(mine, None)

    @property
    def serves(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def doing(self) -> str:
        """Its state according to the log; the last state of a dead server."""
        return doing(_text(self.log).splitlines()) if self.log is not None else "starting"

    def kill(self) -> bool:
        """Kill it; return whether it was running."""
        with suppress(psutil.NoSuchProcess):
            lived = self.process.status() != psutil.STATUS_ZOMBIE
            self.process.kill()
            return lived
        return False


def doing(log: Sequence[str]) -> str:
    """A server's state at the end of its log. A double logs it; a real one logs its answers and batches."""
    last, open_update, running = "idle", False, 0
    for line in log:
        if found := re.match(r"(idle|generating|updating) at ", line):
            last = found[1]
        elif SERVES.search(line):
            last, open_update, running = "idle", False, 0
        elif found := re.search(r'"POST /(\w+) HTTP/1\.1" 200', line):
            if found[1] in ("pause_generation", "begin_weight_update", "init_weights_update_group"):
                open_update = True
            elif found[1] in ("continue_generation", "end_weight_update", "update_weights_from_disk"):
                open_update = False
            running -= found[1] == "generate"
        elif found := re.search(r"Prefill batch.*#new-seq: (\d+)", line):
            running += int(found[1])
    return "updating" if open_update else "generating" if running > 0 else last


def kill_one(run: Run, numbers: random.Random, *, aimed: bool) -> Kill | None:
    """Kill a random running server; None if there was none."""
    servers = run.servers()
    if numbers.random() > ANY:
        servers = [server for server in servers if server.serves] or servers
    if not servers:
        return None
    victim = numbers.choice(servers)
    while aimed and victim.doing() != "updating" and victim.process.is_running() and run.running:
        time.sleep(0.005)
    served, iteration, seconds = victim.serves, run.iterations, time.monotonic() - run.started
    if not victim.kill():
        return None
    time.sleep(0.3)  # the last lines reach the log, but not yet those of its successor
    phase = victim.doing() if served else "starting"
    return Kill(round(seconds, 1), iteration, victim.log.stem if victim.log else "?", victim.process.pid, phase, aimed)


def kill_servers(run: Run, count: int, iterations: int, numbers: random.Random) -> list[Kill]:
    """Kill up to `count` times, a random number of iterations and a random fraction of a second apart."""
    kills: list[Kill] = []
    while len(kills) < count:
        done = max(0, run.iterations)
        average = (iterations - done) / (count - len(kills) + 1)
        if not run.until(done + max(1, round(numbers.uniform(0.0, 1.5 * average)))):
            break
        time.sleep(numbers.uniform(0.0, 1.0))
        kill = kill_one(run, numbers, aimed=numbers.random() < AIMED)
        if kill is not None:
            kills.append(kill)
            hit = f"{kill.server} {kill.phase} after iteration {kill.iteration}"
            print(f"kill {len(kills)} of {count}: {hit}", flush=True)
    return kills


def campaign(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the campaign and return the report, whose `problems` list what was lost."""
    spacing = arguments.spacing or SPACING[arguments.real]
    iterations = arguments.iterations or spacing * (arguments.kills + 2)
    servers = None if arguments.real else stand_in(arguments.folder / "double")

    def overrides(name: str, seed: int) -> list[str]:
        return [
            *("rollout.engine=sglang", "servers.count=2", f"seed={seed}", f"train.iterations={iterations}"),
            *("run.log_rollouts=128", f"run.folder={arguments.folder / name}", *arguments.overrides),
        ]

    mine = overrides("killed", arguments.seed)
    recipe = load_recipe(RECIPE, mine)
    with Run(mine, recipe, servers) as run:
        kills = kill_servers(run, arguments.kills, iterations, random.Random(arguments.seed))
        run.until(iterations)
        code = run.process.wait(STALLED_SECONDS)
        seconds = time.monotonic() - run.started
    if code != 0:
        raise SystemExit(f"error: after {len(kills)} kills the run ended with exit code {code}: {run.output()}")
    found, problems = check_prompts(recipe, prompts_of(recipe))
    problems += check_metrics(recipe)
    if len(kills) < arguments.kills:
        problems.append(f"only {len(kills)} of {arguments.kills} kills before the run ended: give --iterations")
    references = []
    for seed in range(arguments.seed + 1, arguments.seed + 1 + arguments.references):
        other = overrides(f"reference_{seed}", seed)
        with Run(other, load_recipe(RECIPE, other), servers) as reference:
            if reference.process.wait() != 0:
                raise SystemExit(f"error: the undisturbed run failed: {reference.output()}")
        references.append(final_metrics(reference.folder))
    table, different = compare(final_metrics(run.folder), references)
    return {
        "servers": "real" if arguments.real else "doubles",
        "seed": arguments.seed,
        "iterations": iterations,
        "seconds": round(seconds, 1),
        "kills": [asdict(kill) for kill in kills],
        "phases": dict(Counter(kill.phase for kill in kills)),
        "restarts": run.starts() - recipe.servers.count,
        "prompts": found,
        "final": final_metrics(run.folder),
        "references": references,
        "table": table,
        "problems": problems + different,
    }


def show(report: dict[str, Any]) -> None:
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(report["phases"].items()))
    kills, seconds = len(report["kills"]), report["seconds"]
    print(f"{kills} kills of {report['servers']} ({phases}), {report['restarts']} restarts, in {seconds:g} s")
    print(f"{report['iterations']} iterations, {report['prompts']} prompts trained")
    others = f"{len(report['references'])} without faults"
    for name, mine, theirs in [["final metrics", "killed", others], *report["table"]]:
        print(f"  {name:32} {mine:>10}   {theirs}")
    for problem in report["problems"]:
        print(f"LOST: {problem}")
    if not report["problems"]:
        print("every iteration trained each of its prompts once, on responses of the right weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=45)
    parser.add_argument("--real", action="store_true", help="SGLang's own servers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, help="of the run; by default as many as the kills take")
    parser.add_argument("--spacing", type=int, help="mean iterations between two kills")
    parser.add_argument("--references", type=int, default=0, help="undisturbed runs to compare with")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/campaign")
    parser.add_argument("overrides", nargs="*", help="more settings of the recipe")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    report = campaign(arguments)
    (arguments.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report)
    raise SystemExit(1 if report["problems"] else 0)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    main()
