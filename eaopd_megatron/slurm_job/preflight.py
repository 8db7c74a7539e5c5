"""Check every node of a job before anything starts: inspect a node, tabulate the reports, test the network."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eaopd_megatron.diagnostics import machine
from eaopd_megatron.errors import UserError
from eaopd_megatron.utils.environment import git_commit, package_versions
from eaopd_megatron.utils.gpu_environment import local_device_index, query_gpus
from eaopd_megatron.utils.log import log_rank0
from eaopd_megatron.utils.ports import INTERFACE_VARIABLE, claim_port, node_address

_MARK = "eaopd-node "  # before a node's report, among whatever else the node prints
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "sglang")
_BUSY_MIB = 1024  # of GPU memory, above which a GPU counts as taken by another process


@dataclass(frozen=True)
class NodeReport:
    """What one node has. problems: one line each, with its remedy."""

    name: str
    address: str = "?"
    python: str = "?"
    versions: Mapping[str, str] = field(default_factory=dict)  # of the installed ones of _PACKAGES, and of NCCL
    commit: str = "?"
    gpus: int = 0  # that Slurm gives the job here
    disk: int = 0  # bytes free for the run's folder
    problems: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the report as one marked JSON line."""
        return _MARK + json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> list[NodeReport]:
        """Return the reports in the nodes' combined output."""
        reports = [json.loads(line[len(_MARK) :]) for line in text.splitlines() if line.startswith(_MARK)]
        return [cls(**{**report, "problems": tuple(report["problems"])}) for report in reports]


def inspect_node(token: Path, content: str, models: Sequence[str], stage: str | None) -> NodeReport:
    """Inspect this node. token: a file in the run's folder, which is shared if the file holds `content` here too."""
    facts = machine.gather_facts()
    problems = [f"{f.subject}: {f.detail}: {f.remedy}" for f in machine.judge_facts(facts) if f.level == "problem"]
    problems += _path_problems(token, content, models, stage)
    address = "?"
    try:
        address = node_address()
        claim_port(address)
        single_node = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
        if address.startswith("127.") and not single_node and not os.environ.get(INTERFACE_VARIABLE):
            problems.append(
                f"its name has the address {address}, which no other node reaches: set {INTERFACE_VARIABLE}"
            )
    except UserError as error:
        problems.append(str(error))
    gpus = _gpus(facts, problems)
    return NodeReport(
        name=os.environ.get("SLURMD_NODENAME", "?"),
        address=address,
        python=".".join(map(str, facts.python)),
        versions=_package_versions(),
        commit=git_commit() or "?",
        gpus=gpus,
        disk=shutil.disk_usage(token.parent).free if token.parent.exists() else 0,
        problems=tuple(problems),
    )


def print_node_report(token: Path, content: str, stage: str, models: Sequence[str]) -> None:
    print(inspect_node(token, content, models, stage or None).line(), flush=True)


def _path_problems(token: Path, content: str, models: Sequence[str], stage: str | None) -> list[str]:
    problems = []
    read = ""
    with suppress(OSError):
        read = token.read_text().strip()
    if read != content:
        run = token.parents[2]
        problems.append(f"{run} is not the folder that the job's first node sees: set EAOPD_SHARED to a shared one")
    for model in models:
        if Path(model).is_absolute() and not (Path(model) / "config.json").exists():
            problems.append(f"the model {model} does not exist (no config.json): copy it, or set EAOPD_MODELS")
    if stage is not None and not os.access(stage, os.W_OK):
        problems.append(f"EAOPD_STAGE is {stage}, which is not a writable folder")
    return problems


def _gpus(facts: machine.MachineFacts, problems: list[str]) -> int:
    """Return the number of GPUs that Slurm gives the step; append what is wrong with them to `problems`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    by_slurm = len(visible.split(",")) if visible else 0
    by_torch = len(facts.probe.get("gpus", []))
    if facts.driver_gpus and by_torch < by_slurm:
        problems.append(f"Slurm gives {by_slurm} GPUs, torch sees {by_torch}: check the driver and gres.conf")
    problems += busy_gpus()
    return by_slurm


def busy_gpus() -> list[str]:
    """Return a line for each GPU that another process uses according to nvidia-smi, if there is a driver."""
    lines = []
    with suppress(ValueError):
        for index, used in (map(int, values) for values in query_gpus("index", "memory.used")):
            if used > _BUSY_MIB:
                lines.append(f"GPU {index} has {used} MiB in use by another process: find it with nvidia-smi")
    return lines


def _package_versions() -> dict[str, str]:
    """Versions of the packages used on the wire."""
    installed = {name.lower(): version for name, version in package_versions().items()}
    versions = {name: installed[name] for name in _PACKAGES if name in installed}
    nccl = [version for name, version in installed.items() if name.startswith("nvidia-nccl-cu")]
    return {**versions, **({"nccl": nccl[0]} if nccl else {})}


def preflight_report(nodes: Sequence[NodeReport]) -> str:
    """Return a table with one line per node."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("node", "address", "python", *_PACKAGES, "nccl", "commit", "GPUs", "GiB free", ""):
        table.add_column(column, no_wrap=True)
    for node in nodes:
        commit, dirty, _ = node.commit.partition("-")
        table.add_row(
            *(node.name, node.address, node.python),
            *(node.versions.get(name, "-") for name in (*_PACKAGES, "nccl")),
            *(commit[:10] + ("+" if dirty else ""), str(node.gpus), f"{node.disk / 2**30:.0f}"),
            f"{len(node.problems)} wrong" if node.problems else "ok",
        )
    console = Console(file=io.StringIO(), width=1000, color_system=None, markup=False, highlight=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def find_faults(nodes: Sequence[NodeReport], names: Sequence[str], gpus: int, srun: str = "") -> list[str]:
    """Return a line for each problem of a node, node without a report (srun's stderr says why) and difference."""
    nodes = sorted(nodes, key=lambda node: names.index(node.name))
    by_problem: dict[str, list[str]] = {}
    for node in nodes:
        for problem in node.problems:
            by_problem.setdefault(problem, []).append(node.name)
    faults = [f"{', '.join(affected)}: {problem}" for problem, affected in by_problem.items()]
    reporting = {node.name for node in nodes}
    for name in names:
        if name not in reporting:
            why = next((line for line in reversed(srun.splitlines()) if name in line), "it did not answer")
            faults.append(f"{name}: no report ({why.strip()}): does it see the environment's folder, or the image?")
    faults += [f"{node.name}: {node.gpus} GPUs, the job asks for {gpus}" for node in nodes if node.gpus != gpus]
    values = {"python": {n.name: n.python for n in nodes}, "commit": {n.name: n.commit for n in nodes}}
    for package in (*_PACKAGES, "nccl"):
        values[package] = {node.name: node.versions.get(package, "missing") for node in nodes}
    for what, by_node in values.items():
        counts = Counter(by_node.values())
        if len(counts) > 1:
            usual = counts.most_common(1)[0][0]
            others = ", ".join(f"{name} has {value}" for name, value in by_node.items() if value != usual)
            faults.append(f"{what} differs between nodes: {others}, the others {usual}: make them alike")
    return faults


def print_preflight(reports: Path, srun: Path, gpus: int, names: Sequence[str]) -> bool:
    """Print the table of the nodes and their faults; return whether there are none."""
    nodes = NodeReport.read(reports.read_text(errors="replace"))
    print(preflight_report(sorted(nodes, key=lambda node: names.index(node.name))))
    faults = find_faults(nodes, names, gpus, srun.read_text(errors="replace"))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return not faults


def probe_network(minutes: float = 3.0) -> None:
    """Print the bus bandwidth of an all-reduce over the ranks. Raise UserError if it fails or its sum is wrong."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", local_device_index()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        values = torch.ones((256 if cuda else 1) * 2**20 // 4, device=device)
        dist.all_reduce(values)  # opens the connections
        started = time.perf_counter()
        for _ in range(5):
            values.fill_(float(rank + 1))
            dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / 5
    except RuntimeError as error:  # the base class of torch's distributed errors
        raise UserError(
            f"the ranks do not reach each other over {backend}: {' '.join(str(error).split())[:300]} (EAOPD_INTERFACE "
            "names their network)"
        ) from None
    if values[0] != (expected := world_size * (world_size + 1) / 2):
        raise UserError(f"an all-reduce over {backend} gave {float(values[0])} for {expected}: the network is faulty")
    bus = 2 * (world_size - 1) / world_size * values.numel() * 4 / seconds / 1e9
    log_rank0(f"{backend}: {world_size} ranks reach each other, all-reduce at {bus:.1f} GB/s")
    dist.destroy_process_group()
