"""What a node of the job has, as one JSON line that its task of the preflight step prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from eaopd_megatron import doctor
from eaopd_megatron.cluster.places import INTERFACE, hold_port, node_address
from eaopd_megatron.errors import UserError
from eaopd_megatron.reporting.commit import commit

MARK = "eaopd-node "
"""What the line begins with, among whatever else the node prints."""
PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang")
BUSY_MIB = 1024
"""Memory in use from which a GPU counts as another's."""
NCCL = "nvidia-nccl-cu"


@dataclass(frozen=True)
class Node:
    """One node. problems: what is wrong with it, each in one line with its remedy."""

    name: str
    address: str = "?"
    python: str = "?"
    versions: Mapping[str, str] = field(default_factory=dict)  # of PACKAGES and NCCL, where they are there
    commit: str = "?"
    gpus: int = 0  # that the job has here, as torch and Slurm see them
    disk: int = 0  # bytes free for the run's folder
    problems: tuple[str, ...] = ()

    def line(self) -> str:
        return MARK + json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> list[Node]:
        """The nodes that spoke."""
        found = [json.loads(line[len(MARK) :]) for line in text.splitlines() if line.startswith(MARK)]
        return [cls(**{**one, "problems": tuple(one["problems"])}) for one in found]


def look(token: Path, holds: str, models: Sequence[str], stage: str | None) -> Node:
    """This node. token: a file in the run's folder that holds this where the folder is shared."""
    facts = doctor.gather()
    problems = [f"{f.subject}: {f.seen}: {f.remedy}" for f in doctor.findings(facts) if f.level == "problem"]
    problems += _paths(token, holds, models, stage)
    address = "?"
    try:
        address = node_address()
        hold_port(address)
        alone = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
        if address.startswith("127.") and not alone and not os.environ.get(INTERFACE):
            problems.append(f"its name has the address {address}, which no other node reaches: set {INTERFACE}")
    except UserError as error:
        problems.append(str(error))
    gpus = _gpus(facts, problems)
    return Node(
        name=os.environ.get("SLURMD_NODENAME", "?"),
        address=address,
        python=".".join(map(str, facts.python)),
        versions=versions(),
        commit=commit() or "?",
        gpus=gpus,
        disk=shutil.disk_usage(token.parent).free if token.parent.exists() else 0,
        problems=tuple(problems),
    )


def _paths(token: Path, holds: str, models: Sequence[str], stage: str | None) -> list[str]:
    found = []
    there = ""
    with suppress(OSError):
        there = token.read_text().strip()
    if there != holds:
        run = token.parents[2]
        found.append(f"{run} is not the folder that the job's first node sees: set EAOPD_SHARED to a shared one")
    for model in models:
        if Path(model).is_absolute() and not (Path(model) / "config.json").exists():
            found.append(f"the model {model} is not there (no config.json): copy it, or set EAOPD_MODELS")
    if stage is not None and not os.access(stage, os.W_OK):
        found.append(f"EAOPD_STAGE is {stage}, which is no folder that can be written")
    return found


def _gpus(facts: doctor.Facts, problems: list[str]) -> int:
    """How many Slurm gives the step."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    slurm = len(given.split(",")) if given else 0
    seen = len(facts.probe.get("gpus", []))
    if facts.driver_gpus and seen < slurm:
        problems.append(f"Slurm gives {slurm} GPUs, torch sees {seen}: look at the driver and at gres.conf")
    problems += busy_gpus()
    return slurm


def busy_gpus() -> list[str]:
    """A line for each GPU that another process works on, by nvidia-smi; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    found = []
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
        for line in listed.splitlines():
            index, used = map(int, line.split(","))
            if used > BUSY_MIB:
                found.append(f"GPU {index} has {used} MiB in use by another process: find it with nvidia-smi")
    return found


def versions() -> dict[str, str]:
    """Of what the roles speak to each other with, in this environment."""
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]}
    shown = {name: found[name] for name in PACKAGES if name in found}
    nccl = [version for name, version in found.items() if name.startswith(NCCL)]
    return {**shown, **({"nccl": nccl[0]} if nccl else {})}
