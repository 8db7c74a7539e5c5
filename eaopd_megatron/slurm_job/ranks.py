"""Turn the tasks of a Slurm step into ranks or services, and report why a step of ranks failed.

Task 0 of a step picks its ports and writes them to the job's folder, where the step's other tasks and the clients of
the service read them.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eaopd_megatron.errors import UserError, one_line
from eaopd_megatron.launch.local_ranks import read_error_reports
from eaopd_megatron.utils.files import atomic_write
from eaopd_megatron.utils.ports import claim_port, node_address

_LISTEN = "{listen}"  # stands for HOST:PORT in the command line of a service
_RENDEZVOUS_SECONDS = 300.0  # that the other tasks wait for task 0 to publish the address of the ranks' store


@dataclass(frozen=True)
class SlurmStep:
    """A step of the job. name: role and number, such as server_0. folder: the job's, shared by all nodes."""

    name: str
    folder: Path
    gpus: tuple[int, int] | None = None  # (first, count) of the node's GPUs; None: all

    @property
    def url_file(self) -> Path:
        """One line, the URL of the service. It outlives the service, which restarts on the same port."""
        return self.folder / f"{self.name}.url"

    @property
    def rendezvous_file(self) -> Path:
        """One line: an id of this start of the step, host and port of the ranks' store."""
        return self.folder / f"{self.name}.ranks"

    def prepare(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """Return this task's command line and environment overrides. Ports stay claimed until the process ends."""
        is_main = environment["SLURM_PROCID"] == "0"
        address = node_address(environment)
        seed = int(environment["SLURM_JOB_ID"]) + zlib.crc32(self.name.encode())
        overrides = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
        }
        if self.gpus is not None and "CUDA_VISIBLE_DEVICES" in environment:
            visible = environment["CUDA_VISIBLE_DEVICES"].split(",")
            overrides["CUDA_VISIBLE_DEVICES"] = self._own_gpus(visible, int(environment["SLURM_NTASKS"]))
        if is_main and any(_LISTEN in part for part in command):
            claim = claim_port(address, first=self._previous_port(address), seed=seed)
            claim.keep_across_exec()
            atomic_write(self.url_file, f"http://{address}:{claim.port}\n")
            command = [part.replace(_LISTEN, f"{address}:{claim.port}") for part in command]
        if is_main:
            claim = claim_port(address, seed=seed + 1)
            claim.keep_across_exec()
            rendezvous = (address, str(claim.port))
            atomic_write(self.rendezvous_file, " ".join((_start_id(environment), *rendezvous)) + "\n")
        else:
            rendezvous = self._wait_for_rendezvous(_start_id(environment))
        return list(command), overrides | dict(zip(("MASTER_ADDR", "MASTER_PORT"), rendezvous, strict=True))

    def _own_gpus(self, devices: list[str], tasks: int) -> str:
        assert self.gpus is not None
        first, count = self.gpus
        if first == 0 and len(devices) == 1 and tasks == count:
            return devices[0]  # the site shows each task a GPU of its own
        if first + count > len(devices):
            raise UserError(
                f"{self.name} needs GPUs {first} to {first + count - 1} of its node, which shows {len(devices)}: let "
                "each task see all of them (no --gpu-bind, no --gpus-per-task)"
            )
        return ",".join(devices[first : first + count])

    def _previous_port(self, address: str) -> int | None:
        """The port of the service before its restart; None on the first start or on another node."""
        if not self.url_file.exists():
            return None
        host, _, port = self.url_file.read_text().strip().removeprefix("http://").rpartition(":")
        return int(port) if host == address else None

    def _wait_for_rendezvous(self, start_id: str) -> tuple[str, str]:
        deadline = time.monotonic() + _RENDEZVOUS_SECONDS
        while True:
            words = self.rendezvous_file.read_text().split() if self.rendezvous_file.exists() else []
            if len(words) == 3 and words[0] == start_id:
                return words[1], words[2]
            if time.monotonic() > deadline:
                raise UserError(f"{self.rendezvous_file} does not say where the ranks of {self.name} meet")
            time.sleep(0.1)


def _start_id(environment: Mapping[str, str]) -> str:
    """Unique per step start, including restarts after a requeue."""
    return f"{environment.get('SLURM_RESTART_COUNT', '0')}.{environment['SLURM_STEP_ID']}"


def exec_as_rank(name: str, folder: Path, gpus: str, command: Sequence[str]) -> None:
    """Replace this process by `command` with its rank, GPUs (FIRST:COUNT, or all) and ports in the environment."""
    first, _, count = gpus.partition(":")
    step = SlurmStep(name, folder, (int(first), int(count)) if gpus else None)
    command, overrides = step.prepare(command, os.environ)
    os.environ.update(overrides)
    os.execvp(command[0], command)


_FATAL = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_SIGNALS = {"Out Of Memory": 9, **{str(signal.strsignal(number)): int(number) for number in _FATAL}}
_SRUN_EVENT = re.compile(
    r"srun: error: (?P<node>[\w.-]+): tasks? (?P<tasks>[\d,-]+): "
    rf"(?:Exited with exit code (?P<code>\d+)|(?P<signal>{'|'.join(_SIGNALS)}))"
)
_TERMINATED = 128 + 15  # of ranks that srun ended because another rank failed, or that saved their state at SIGTERM
_STOP_CODES = (_TERMINATED, 128 + 10)  # of ranks that a signal asked to stop


@dataclass(frozen=True)
class FailureReport:
    """Why a step ended."""

    code: int  # of the failing rank; 0 if the ranks were asked to stop and none failed
    text: str
    user: bool  # an error that the user can mend, and a restart cannot


def failure_report(srun: str, errors: Path, logs: Path, code: int) -> FailureReport:
    """Find the rank that failed first from srun's stderr, the ranks' error reports, rank_N.log and the step's code."""
    reports = read_error_reports(errors)
    users = next((report for report in reports if report.get("user")), None)
    if users is not None:
        code = int(users.get("exit_code", 1)) or 1
        text = f"error: {one_line(users['message'])} (rank {users['rank']}, exit code {code})"
        return FailureReport(code, text, user=True)
    codes = [int(event["code"] or 0) for event in _SRUN_EVENT.finditer(srun)]
    if not reports and code in _STOP_CODES and all(one in _STOP_CODES for one in codes):
        return FailureReport(0, "the ranks were asked to stop and saved their state", user=False)
    rank, code, how = _first_failure(srun, reports[0]["rank"] if reports else None, code)
    if rank is None:
        text = "\n".join([f"error: the step ended with exit code {code}", *_last_lines(srun)])
        return FailureReport(code, text, user=False)
    message = next((f": {one_line(report['message'])}" for report in reports if report["rank"] == rank), "")
    log = logs / f"rank_{rank}.log"
    tail = log.read_bytes()[-65536:].decode("utf-8", errors="replace") if log.exists() else ""
    head = f"error: rank {rank} {how}{message}; the last lines of {log}:"
    return FailureReport(code, "\n".join([head, *(f"  | {line}" for line in _last_lines(tail))]), user=False)


def print_failure(srun: Path, errors: Path, logs: Path, code: int) -> int:
    """Print the report and return its code; a user's error leaves a file `user` in the folder `errors`."""
    report = failure_report(srun.read_text(errors="replace"), errors, logs, code)
    print(report.text, file=sys.stderr, flush=True)
    if report.user:
        (errors / "user").touch()
    return report.code


def _first_failure(srun: str, reporting: int | None, code: int) -> tuple[int | None, int, str]:
    """Rank, exit code and cause of the first failure in srun's view or, if it was no kill, of the `reporting` rank."""
    events = [
        (int(re.split("[,-]", event["tasks"])[0]), int(event["code"] or 128 + _SIGNALS[event["signal"]]), event)
        for event in _SRUN_EVENT.finditer(srun)
    ]
    events = [event for event in events if event[1] != _TERMINATED] or events
    if not events:
        return reporting, code, f"ended with exit code {code}"
    if not events[0][2]["signal"]:  # a killed rank writes no report, and the ranks that it brings down do
        events = [event for event in events if event[0] == reporting] or events
    rank, code, event = events[0]
    how = f"was killed ({event['signal']})" if event["signal"] else f"ended with exit code {code}"
    return rank, code, f"{how} on {event['node']}"


def _last_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()][-20:]
