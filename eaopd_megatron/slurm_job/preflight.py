"""What a node of the job has, as one JSON line that its task of the preflight step prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

from eaopd_megatron.diagnostics import machine as doctor
from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.ports import INTERFACE_VARIABLE, claim_port, node_address
from eaopd_megatron.utils.environment import git_commit
from eaopd_megatron.utils.log import log_rank0

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
        claim_port(address)
        alone = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
        if address.startswith("127.") and not alone and not os.environ.get(INTERFACE_VARIABLE):
            problems.append(
                f"its name has the address {address}, which no other node reaches: set {INTERFACE_VARIABLE}"
            )
    except UserError as error:
        problems.append(str(error))
    gpus = _gpus(facts, problems)
    return Node(
        name=os.environ.get("SLURMD_NODENAME", "?"),
        address=address,
        python=".".join(map(str, facts.python)),
        versions=versions(),
        commit=git_commit() or "?",
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


def _gpus(facts: doctor.MachineFacts, problems: list[str]) -> int:
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


COLUMNS = ("node", "address", "python", *PACKAGES, "nccl", "commit", "GPUs", "GiB free", "")
COMMIT = 10
"""Characters of a commit that are shown."""


def table(nodes: Sequence[Node]) -> list[str]:
    """Its lines, one a node, the columns aligned."""
    rows = [COLUMNS, *(_row(node) for node in nodes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(node: Node) -> tuple[str, ...]:
    packages = [node.versions.get(name, "-") for name in (*PACKAGES, "nccl")]
    commit, dirty, _ = node.commit.partition("-")
    shown = (commit[:COMMIT] + ("+" if dirty else ""), str(node.gpus), f"{node.disk / 2**30:.0f}")
    verdict = f"{len(node.problems)} wrong" if node.problems else "ok"
    return (node.name, node.address, node.python, *packages, *shown, verdict)


def faults(nodes: Sequence[Node], wanted: Sequence[str], gpus: int, said: str = "") -> list[str]:
    """One line each: what a node says of itself, and in what the nodes differ.

    wanted: the job's nodes. gpus: that each should have. said: what srun wrote, which tells why a node is silent.
    """
    nodes = sorted(nodes, key=lambda node: wanted.index(node.name))
    by_problem: dict[str, list[str]] = {}
    for node in nodes:
        for problem in node.problems:
            by_problem.setdefault(problem, []).append(node.name)
    found = [f"{', '.join(names)}: {problem}" for problem, names in by_problem.items()]
    spoke = {node.name for node in nodes}
    for name in wanted:
        if name not in spoke:
            why = next((line for line in reversed(said.splitlines()) if name in line), "it did not answer")
            found.append(f"{name}: no report ({why.strip()}): is the environment's folder, or the image, there?")
    found += [f"{node.name}: {node.gpus} GPUs, the job asks for {gpus}" for node in nodes if node.gpus != gpus]
    values = {"python": {n.name: n.python for n in nodes}, "commit": {n.name: n.commit for n in nodes}}
    for package in (*PACKAGES, "nccl"):
        values[package] = {node.name: node.versions.get(package, "missing") for node in nodes}
    for what, of in values.items():
        counted = Counter(of.values())
        if len(counted) > 1:
            usual = counted.most_common(1)[0][0]
            others = ", ".join(f"{name} has {value}" for name, value in of.items() if value != usual)
            found.append(f"{what} differs between nodes: {others}, the others {usual}: make them alike")
    return found


MIB = 256
"""Of one all-reduce on GPUs."""
ROUNDS = 5


def probe(minutes: float = 3.0) -> None:
    """Joins the step's ranks and prints one line with the bus bandwidth. Raises UserError where the sum is wrong, or
    the ranks do not meet in time."""
    cuda = torch.cuda.is_available()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        values = torch.ones((MIB if cuda else 1) * 2**20 // 4, device=device)
        dist.all_reduce(values)  # makes the connections
        started = time.perf_counter()
        for _ in range(ROUNDS):
            values.fill_(float(rank + 1))
            dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / ROUNDS
    except RuntimeError as error:  # torch's distributed errors are
        raise UserError(
            f"the ranks do not reach each other over {backend}: {' '.join(str(error).split())[:300]} (EAOPD_INTERFACE "
            "names their network)"
        ) from None
    if values[0] != (expected := world_size * (world_size + 1) / 2):
        raise UserError(f"an all-reduce over {backend} gave {float(values[0])} for {expected}: the network is faulty")
    bus = 2 * (world_size - 1) / world_size * values.numel() * 4 / seconds / 1e9
    log_rank0(f"{backend}: {world_size} ranks reach each other, all-reduce at {bus:.1f} GB/s")
    dist.destroy_process_group()
