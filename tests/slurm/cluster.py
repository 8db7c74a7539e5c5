"""Run a Slurm cluster on this machine: munged, slurmctld, and a slurmd for each of a few nodes with eight fake GPUs.

Needs root, because Slurm starts jobs as their users. Nothing outlives `Cluster`: it ends its own processes by id and
removes the nodes' names from /etc/hosts.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HOSTS = Path("/etc/hosts")
MARK = "# one-machine Slurm cluster of tests"
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY"}

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
JobRequeue=1
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


@dataclass
class Cluster:
    """A running cluster; a context manager. `environment` holds the variables that Slurm's commands need.

    A job in the partition `urgent` preempts those in `main`, which then have `grace` seconds to end.
    """

    folder: Path
    nodes: int = 3
    grace: int = 20
    gpus: int = 8
    cpus: int = 32
    environment: dict[str, str] = field(init=False)
    _processes: dict[str, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    @property
    def names(self) -> list[str]:
        return [f"n{i}" for i in range(self.nodes)]

    def __enter__(self) -> Cluster:
        for name in ("state", "gpus"):
            (self.folder / name).mkdir(parents=True)
        for i in range(self.gpus):
            (self.folder / "gpus" / f"gpu{i}").symlink_to("/dev/null")
        self._write_configuration()
        self._name_nodes(True)
        try:
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-D"])
            for name in self.names:
                self.start_node(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--user=root", check=False)
            self.wait(lambda: not self.run("squeue", "-h", check=False).strip(), 20, "the jobs to end")
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        self._name_nodes(False)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Return a command's stdout and stderr. Raises AssertionError with both if it fails."""
        done = subprocess.run(
            command, env={**self.environment, **variables}, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def job(self, number: int) -> dict[str, str]:
        """Return what `scontrol` shows of a job; of the first component of a heterogeneous one."""
        line = self.run("scontrol", "show", "job", "-o", str(number)).splitlines()[0]
        return dict(part.partition("=")[::2] for part in line.split() if "=" in part)

    def state(self, number: int) -> str:
        return self.job(number)["JobState"]

    def states(self, number: int) -> list[str]:
        """Return the state of each component of a heterogeneous job."""
        lines = self.run("scontrol", "show", "job", "-o", str(number)).splitlines()
        return [part.partition("=")[2] for line in lines for part in line.split() if part.startswith("JobState=")]

    def finish(self, number: int, seconds: float = 300) -> str:
        """Wait for a job and return its final state. Raises AssertionError if it does not end in time."""
        self.wait(lambda: all(s in FINISHED for s in self.states(number)), seconds, f"job {number} to end")
        return self.state(number)

    def start_node(self, name: str, hidden: Path | None = None) -> None:
        """Start a node's slurmd, also after `kill_node`. hidden: a folder that appears empty on this node."""
        slurmd = ["slurmd", "-D", "-N", name]
        if hidden is not None:
            mount = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(slurmd)}"
            slurmd = ["unshare", "--mount", "sh", "-c", mount]
        self._start(f"slurmd {name}", slurmd)
        self.wait(lambda: self.node_is_idle(name), 30, f"{name} to be idle")

    def node_is_idle(self, name: str) -> bool:
        return self.run("sinfo", "-h", "-n", name, "-p", "main", "-o", "%T", check=False).strip() == "idle"

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd and everything that runs under it at once, as when a node dies."""
        doomed = [self._processes.pop(f"slurmd {name}")]
        pids = [pid for process in doomed for pid in [process.pid, *_below(process.pid)]]
        # slurmstepd leaves slurmd's process tree, and its title covers its environment: its node's log is open, though
        log = str(self.folder / f"slurmd-{name}.log")
        pids += [pid for step in _titled("slurmstepd: [") if log in _open_files(step) for pid in [step, *_below(step)]]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in doomed:
            process.wait()

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{self._told()}"
            time.sleep(0.2)

    def _told(self) -> str:
        logs = [self.folder / "slurmctld.log", *(self.folder / f"slurmd-{name}.log" for name in self.names)]
        return "\n".join(
            f"{log.name}: {''.join(log.read_text().splitlines(True)[-8:])}" for log in logs if log.exists()
        )

    def _write_configuration(self) -> None:
        ports = _free_ports(1 + self.nodes)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            f"RealMemory=64000 Gres=gpu:{self.gpus} State=UNKNOWN"
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        host = socket.gethostname()
        conf = CONF.format(folder=self.folder, host=host, port=ports[0], nodes=nodes, grace=self.grace)
        (self.folder / "slurm.conf").write_text(conf)
        files = f"{self.folder}/gpus/gpu[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=n[0-{self.nodes - 1}] Name=gpu File={files}\n")

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        paths = {name: str(self.folder / f"munge.{name}") for name in ("socket", "pid", "log", "seed")}
        options = [
            f"--{option}={paths[name]}"
            for option, name in (("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))
        ]
        self._start("munged", ["munged", "-F", "--force", f"--key-file={key}", *options])
        self.wait(Path(paths["socket"]).exists, 10, "munged")

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name.replace(' ', '-')}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def _name_nodes(self, there: bool) -> None:
        lines = [line for line in HOSTS.read_text().splitlines() if MARK not in line]
        if there:
            lines.append(f"127.0.0.1 {' '.join(self.names)} {MARK}")
        HOSTS.write_text("\n".join(lines) + "\n")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _below(pid: int) -> list[int]:
    """Return all descendants of a process."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [found for child in children for found in [child, *_below(child)]]


def _titled(title: str) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if (entry / "cmdline").read_bytes().decode(errors="replace").startswith(title):
                yield int(entry.name)


def _open_files(pid: int) -> list[str]:
    with suppress(OSError):
        return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return []
