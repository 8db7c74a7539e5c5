"""Start and supervise the ranks of one host, or join ranks that torchrun or srun started.

The launcher supervises subprocesses itself because torch's elastic launcher ends every failed run with a page of its
own, where here a user's error is one line on stderr. Also, the ranks have FAILURE_GRACE_SECONDS to report why one of
them died, and SIGTERM means "save and stop". As in torch's launcher, the TCP store lives in the launcher and all ranks
are its clients: its port is free because it is bound at once, and it outlives any rank.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from eaopd_megatron.errors import UserError, one_line
from eaopd_megatron.utils.lifetime import (
    BUSY_FILE_SECONDS,
    ERROR_FILE_VARIABLE,
    LAUNCHER_PID_VARIABLE,
    busy_file,
    finished_file,
)
from eaopd_megatron.utils.ports import listening_store, port_range

if TYPE_CHECKING:
    from eaopd_megatron.config import StudentConfig
    from eaopd_megatron.config.parallel import ParallelLayout

WORKER_COMMAND = (sys.executable, "-m", "eaopd_megatron.worker")
_POLL_SECONDS = 0.1
SHUTDOWN_SECONDS = 60.0
"""Time between SIGTERM and SIGKILL, which begins anew while rank 0 says that it saves (`must_complete`)."""
_AT_ONCE = "a second signal ends them at once"
FAILURE_GRACE_SECONDS = 5.0
"""Time in which the other ranks may report an error after one rank has failed, before they are killed."""

_STOPPED_CODES = {128 + signal.SIGTERM, 128 + signal.SIGINT}
"""Exit codes of a rank that stopped because a signal asked it to."""

_ROOT_CAUSE_SIGNALS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that kill a rank for a reason of its own, rather than because another rank has failed."""


def is_started_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun, or an srun step of several tasks, started this process as a rank."""
    return _by_torchrun(environment) or _by_srun(environment)


def _by_torchrun(environment: Mapping[str, str]) -> bool:
    return all(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def _by_srun(environment: Mapping[str, str]) -> bool:
    # a batch script has SLURM_PROCID and SLURM_NTASKS too, but is not a step
    tasks = environment.get("SLURM_NTASKS", "1")
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and tasks.isdigit() and int(tasks) > 1


def rank_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables for torch.distributed's env://: torchrun's or, if missing, derived from srun's."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = {name: environment[name] for name in names if name in environment}
    if _by_torchrun(environment):
        return present
    derived = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_PORT": str(_slurm_port(environment)),
    }
    if "MASTER_ADDR" not in present:
        derived["MASTER_ADDR"] = _first_host(environment)
    return {**derived, **{name: present[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in present}}


def _slurm_port(environment: Mapping[str, str]) -> int:
    """Return a port that all tasks of a step derive alike, and that differs between steps."""
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment["SLURM_STEP_ID"])
    low, high = port_range(environment)
    return low + (job * 101 + step) % (high - low + 1)


def _first_host(environment: Mapping[str, str]) -> str:
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if hosts and not set(hosts) & set("[,"):
        return hosts
    try:
        shown = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return shown.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"the first host of the Slurm step cannot be read from {hosts!r} with scontrol; set MASTER_ADDR to its name"
        ) from None


def student_world_size(student: StudentConfig) -> int:
    """Return the number of ranks this host starts for a student: its model-parallel size times data_parallel.

    Without data_parallel in the recipe: on a CPU as few replicas as the experts need (1 without experts), with GPUs as
    many as fit.
    """
    devices = _devices()
    layout, replicas = student.parallel_layout, student.data_parallel
    if replicas is None:
        least = layout.min_data_parallel_size
        replicas = max(1, (devices or 0) // (layout.model_parallel_size * least)) * least
    ranks = layout.model_parallel_size * replicas
    parts = f"{layout.model_parallel_size} x {replicas} ranks (tensor x pipeline x context x data_parallel)"
    return _on_this_host(ranks, devices, f"the student needs {parts}")


def teacher_world_size(layout: ParallelLayout) -> int:
    """Return the number of ranks this host starts for a separate teacher.

    It has data-parallel ranks only as far as its experts need them.
    """
    ranks = layout.min_world_size
    return _on_this_host(ranks, _devices(), f"the teacher needs {ranks} ranks (tensor x pipeline x expert_parallel)")


def _on_this_host(ranks: int, devices: int | None, need: str) -> int:
    if devices is not None and ranks > devices:
        raise UserError(
            f"{need}, more than the {devices} GPUs of this host; lower them, or start the ranks of several hosts with "
            "srun or torchrun"
        )
    return ranks


def replicas_that_fit(tensor_parallel: int) -> int:
    """Return the number of copies of a model that this host's GPUs hold, each on `tensor_parallel`; 1 without GPUs."""
    devices = _devices()
    if devices is not None and tensor_parallel > devices:
        raise UserError(f"--tensor-parallel {tensor_parallel}: more than the {devices} GPUs of this host")
    return (devices or tensor_parallel) // tensor_parallel


def _devices() -> int | None:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else None


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  # size of the log before the start
    ended: float | None = None  # time at which its end was observed
    killed: bool = False  # by the launcher

    @property
    def failed(self) -> bool:
        return self.process.returncode not in (None, 0)

    def kill(self) -> None:
        """Send SIGKILL to the rank and its children."""
        self.killed = self.killed or self.process.poll() is None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def launch_ranks(
    arguments: Sequence[str],
    world_size: int,
    *,
    command: Sequence[str] = WORKER_COMMAND,
    log_folder: Path | None = None,
) -> int:
    """Run `command + arguments` once per rank on this host and return the exit code of the run.

    It is 0 if every rank succeeded and, as a worker, said that its work is done. A failed rank ends the others within
    FAILURE_GRACE_SECONDS, and one line `error: ...` on stderr names the cause: the earliest error that a rank reports
    as the user's, else the rank that failed first. SIGINT, SIGTERM and SIGHUP are passed on as SIGTERM;
    SHUTDOWN_SECONDS later, longer as long as rank 0 is in `must_complete`, or at the second signal, the ranks are
    killed, and the code is 128 + the signal's number. Rank 0 inherits stdout; all other output is appended to
    `log_folder`/rank_N.log (without a folder: in a temporary one, which is kept only if a rank fails for a reason that
    is not the user's). A rank reports an error as one JSON object, {"message", "exit_code", "rank", "user", "time"}, in
    `$EAOPD_ERROR_FILE.RANK`.
    """
    with tempfile.TemporaryDirectory(prefix="eaopd-") as scratch, _signals() as received:
        if log_folder is None:
            logs = Path(tempfile.mkdtemp(prefix="eaopd-logs-"))
        else:
            logs = log_folder
            logs.mkdir(parents=True, exist_ok=True)
        store = listening_store()
        ranks: list[_Rank] = []
        try:
            for number in range(world_size):
                environment = _child_environment(number, world_size, store.port, Path(scratch) / "error")
                ranks.append(_start([*command, *arguments], number, environment, logs))
            late = _supervise(ranks, received, busy_file(Path(scratch) / "error"))
        finally:
            for rank in ranks:
                if rank.process.poll() != 0:
                    rank.kill()
            for rank in ranks:
                rank.process.wait()
        errors = read_error_reports(Path(scratch))
        unfinished = [n for n in range(world_size) if not finished_file(Path(scratch) / "error", n).exists()]
    code, line = _verdict(ranks, errors, received, late)
    if code == 0 and unfinished and tuple(command) == WORKER_COMMAND:
        rank = ranks[unfinished[0]]
        code, line = 1, f"error: rank {rank.number} ended with exit code 0 before its work was done (log: {rank.log})"
    if line:
        print(line, file=sys.stderr, flush=True)
    if log_folder is None and (code == 0 or str(logs) not in (line or "")):
        shutil.rmtree(logs)
    return code


def _child_environment(number: int, world_size: int, port: int, error_file: Path) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # env:// connects rank 0 too to the launcher's store
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        ERROR_FILE_VARIABLE: str(error_file),
        LAUNCHER_PID_VARIABLE: str(os.getpid()),
    }


def _start(command: Sequence[str], number: int, environment: Mapping[str, str], logs: Path) -> _Rank:
    log = logs / f"rank_{number}.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else stream,
            stderr=stream,
            # so that a terminal's Ctrl-C reaches only the launcher, and a rank is killed with its children
            start_new_session=True,
        )
        return _Rank(number, process, log, stream.tell())


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect the signals that ask the run to stop; restore the old handlers at the end."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {}
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # nohup
            before[name] = signal.signal(name, note)
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _supervise(ranks: Sequence[_Rank], received: Sequence[signal.Signals], busy: Path) -> list[int]:
    """Wait until all ranks have ended or must be killed; return those that ignored a signal for too long."""
    stopped = failed = None
    patience = 0.0  # time until which stopped ranks may live
    while True:
        for rank in ranks:
            if rank.ended is None and rank.process.poll() is not None:
                rank.ended = time.time()
        running = [rank for rank in ranks if rank.ended is None]
        now = time.monotonic()
        if not running:
            return []
        if received and stopped is None:
            stopped, patience = now, now + SHUTDOWN_SECONDS
            time_left = f"{SHUTDOWN_SECONDS:g} s to save their state, and longer as long as they say that they do"
            print(f"{received[0].name}: the ranks have {time_left}; {_AT_ONCE}", file=sys.stderr, flush=True)
            for rank in running:
                rank.process.send_signal(signal.SIGTERM)
        if failed is None and any(rank.failed and not _obeyed(rank, stopped is not None) for rank in ranks):
            failed = now
        if stopped is not None and _is_fresh(busy):
            patience = now + SHUTDOWN_SECONDS
        if stopped is not None and (now > patience or len(received) > 1):
            return [rank.number for rank in running]
        if failed is not None and now - failed > FAILURE_GRACE_SECONDS:
            return []
        time.sleep(_POLL_SECONDS)


def _is_fresh(busy: Path) -> bool:
    with suppress(FileNotFoundError):
        return time.time() - busy.stat().st_mtime < BUSY_FILE_SECONDS
    return False


def _obeyed(rank: _Rank, requested: bool) -> bool:
    """Return whether a rank's exit code only says that it stopped as requested."""
    return requested and rank.process.returncode in _STOPPED_CODES


def read_error_reports(folder: Path) -> list[dict[str, Any]]:
    """Return the ranks' error reports, written for `$EAOPD_ERROR_FILE=folder/error`, earliest first."""
    reports = []
    for path in folder.glob("error.*"):
        with suppress(OSError, ValueError):
            report = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(report, dict) and "message" in report:
                reports.append({"rank": int(path.suffix[1:]), "time": path.stat().st_mtime, **report})
    return sorted(reports, key=lambda report: float(report["time"]))


def _verdict(
    ranks: Sequence[_Rank], errors: Sequence[dict[str, Any]], received: Sequence[signal.Signals], late: Sequence[int]
) -> tuple[int, str | None]:
    """Return the exit code of the run and the line for stderr, if any."""
    for error in errors:
        if error.get("user"):
            return int(error.get("exit_code", 1)) or 1, f"error: {one_line(error['message'])}"
    if received:
        code = 128 + received[0]
        if late:
            return (
                code,
                f"error: stopped by {received[0].name}; rank {', '.join(map(str, late))} had not ended and was killed",
            )
        if all(_obeyed(rank, True) or rank.process.returncode in (0, -signal.SIGTERM) or rank.killed for rank in ranks):
            return code, f"stopped by {received[0].name}"
    failed = [rank for rank in ranks if rank.failed and not rank.killed and not _obeyed(rank, bool(received))]
    if not failed:
        return 0, None
    reports = {int(error["rank"]): error for error in reversed(errors)}

    def order(rank: _Rank) -> tuple[int, float]:
        report = reports.get(rank.number)
        root_cause = rank.process.returncode < 0 and -rank.process.returncode in _ROOT_CAUSE_SIGNALS
        return (0 if root_cause else 1), float(report["time"]) if report else rank.ended or 0.0

    first = min(failed, key=order)
    code = first.process.returncode
    how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    why = reports[first.number]["message"] if first.number in reports else _last_error(first)
    why = f": {one_line(why)}" if why and (code >= 0 or first.number in reports) else ""
    return (128 - code if code < 0 else code), f"error: rank {first.number} {how}{why} (log: {first.log})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_error(rank: _Rank) -> str:
    """Return the last line of the rank's log that looks like an exception, else the last line."""
    with rank.log.open("rb") as stream:
        stream.seek(max(rank.log_start, rank.log.stat().st_size - 65536))
        text = stream.read().decode("utf-8", errors="replace")
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    exceptions = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (exceptions or lines or [""])[-1]
