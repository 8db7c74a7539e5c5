"""The nodes of a job side by side, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eaopd_megatron.cluster.nodes import PACKAGES, Node

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
