"""A task of a Slurm step becomes a rank, or a service: it gets its GPUs, and ports that are free on its node.

Task 0 chooses the ports and writes them down in the job's folder, where the step's other tasks, and who wants the
service, find them.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.ports import claim_port, node_address
from eaopd_megatron.utils.files import atomic_write

LISTEN = "{listen}"
"""In a service's command line: HOST:PORT where it shall listen."""
MEETING_SECONDS = 300.0
"""What the other tasks wait for task 0 to name the place where they meet."""


@dataclass(frozen=True)
class Step:
    """name: of the role and its number, such as server_0. folder: the job's, which all nodes see."""

    name: str
    folder: Path
    gpus: tuple[int, int] | None = None  # (first, count) of the node's; none: all

    @property
    def url_file(self) -> Path:
        """Its one line is the service's URL. It stays when the service dies: another life has the same port."""
        return self.folder / f"{self.name}.url"

    @property
    def meeting_file(self) -> Path:
        """Which step of the job it is of, host and port of the ranks' store."""
        return self.folder / f"{self.name}.ranks"

    def prepare(self, command: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        """The command line and the variables of this task. Holds its ports until the process ends."""
        main = environment["SLURM_PROCID"] == "0"
        address = node_address(environment)
        seed = int(environment["SLURM_JOB_ID"]) + zlib.crc32(self.name.encode())
        ours = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
        }
        if self.gpus is not None and "CUDA_VISIBLE_DEVICES" in environment:
            ours["CUDA_VISIBLE_DEVICES"] = self._share(environment["CUDA_VISIBLE_DEVICES"].split(","))
        if main and any(LISTEN in part for part in command):
            held = claim_port(address, first=self._port_of_last_life(address), seed=seed)
            held.keep_across_exec()
            atomic_write(self.url_file, f"http://{address}:{held.port}\n")
            command = [part.replace(LISTEN, f"{address}:{held.port}") for part in command]
        if main:
            held = claim_port(address, seed=seed + 1)
            held.keep_across_exec()
            meeting = (address, str(held.port))
            atomic_write(self.meeting_file, " ".join((_life(environment), *meeting)) + "\n")
        else:
            meeting = self._await_meeting(_life(environment))
        return list(command), ours | dict(zip(("MASTER_ADDR", "MASTER_PORT"), meeting, strict=True))

    def _share(self, devices: list[str]) -> str:
        assert self.gpus is not None
        first, count = self.gpus
        if first + count > len(devices):
            last = first + count - 1
            raise UserError(f"{self.name} needs GPUs {first} to {last} of its node, which shows {len(devices)}")
        return ",".join(devices[first : first + count])

    def _port_of_last_life(self, address: str) -> int | None:
        if not self.url_file.exists():
            return None
        host, _, port = self.url_file.read_text().strip().removeprefix("http://").rpartition(":")
        return int(port) if host == address else None

    def _await_meeting(self, life: str) -> tuple[str, str]:
        deadline = time.monotonic() + MEETING_SECONDS
        while True:
            words = self.meeting_file.read_text().split() if self.meeting_file.exists() else []
            if len(words) == 3 and words[0] == life:
                return words[1], words[2]
            if time.monotonic() > deadline:
                raise UserError(f"{self.meeting_file} does not say where the ranks of {self.name} meet")
            time.sleep(0.1)


def _life(environment: Mapping[str, str]) -> str:
    """Another one for every start of a step, also of a job that was requeued."""
    return f"{environment.get('SLURM_RESTART_COUNT', '0')}.{environment['SLURM_STEP_ID']}"


def become(step: Step, command: Sequence[str]) -> None:
    """Does not return: this process is the command then."""
    command, ours = step.prepare(command, os.environ)
    os.environ.update(ours)
    os.execvp(command[0], command)
