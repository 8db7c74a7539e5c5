"""Compare and collect the results of `tools/gpu_check.sh`.

report.py compare RUN RUN CODE     two runs that must be equal: metrics and exported weights; the stopped one's code
report.py speed METRICS PLAN       an iteration's rates, and its peak memory beside the plan's
report.py environment              versions, commit and device, as JSON
report.py write WORK OUT SECONDS   check.json and check.md of the steps so far; exits with 1 if one has failed
"""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone works without being installed

from tools.gpu_check.findings import PREFIX, record
from tools.lib.run_records import records

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers")
MEMORY_TOLERANCE = 0.10


def compare(first: Path, second: Path, stopped_with: int) -> None:
    """Record whether two runs have equal metrics, and how far their exported students lie from each other.

    stopped_with: exit code with which the second one was stopped by SIGTERM before it went on. Runs that differ in
    their first iteration, before the stop, prove nothing about resuming.
    """
    from safetensors.torch import load_file

    record("exit code after SIGTERM", stopped_with, stopped_with == 128 + signal.SIGTERM)
    deterministic = True
    for one, other in zip(records(first), records(second), strict=True):
        unequal = {name: [one[name], other.get(name)] for name in one if one[name] != other.get(name)}
        record(f"metrics of iteration {one['iteration']} that differ", dict(list(unequal.items())[:6]))
        deterministic = deterministic and not (unequal and one["iteration"] <= 1)
    students = [load_file(next((folder / "student").glob("*.safetensors"))) for folder in (first, second)]
    largest = max(float((students[0][n].float() - students[1][n].float()).abs().max()) for n in students[0])
    if not deterministic:
        record("the device adds in any order: two runs differ before the stop, weights at last by", largest)
    else:
        record("a resumed run's student, bit for bit (largest difference of a weight)", largest, largest == 0)


def speed(path: Path, plan: Path) -> None:
    """Record rates of the last iteration and the peak of allocated memory against the plan."""
    last = json.loads(path.read_text().splitlines()[-1])
    for name in sorted(last):
        if name.startswith(("time/", "throughput/", "rollout/tokens", "rollout/logprob_gap", "optimizer/grad_norm")):
            record(name, last[name])
    import torch

    recipe = json.loads(plan.read_text())["recipe"]
    phases: dict[str, float] = {}
    for part in recipe["parts"]:
        phases[part["phase"]] = phases.get(part["phase"], 0.0) + part["bytes"]
        record(f"plan: {part['role']}, {part['part']} ({part['phase']}), GiB", round(part["bytes"] / 2**30, 3))
    fixed = phases.pop("always", 0.0) + phases.pop("training", 0.0)
    planned = fixed + max(phases.values(), default=0.0)
    measured = float(last["memory/peak"])
    ratio = measured / planned
    text = f"{measured / 2**30:.2f} GiB of {planned / 2**30:.2f} GiB planned ({ratio:.2f})"
    record("peak memory of tensors", text, abs(ratio - 1) <= MEMORY_TOLERANCE if torch.cuda.is_available() else None)


def findings(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [json.loads(line.removeprefix(PREFIX)) for line in lines if line.startswith(PREFIX)]


def junit(path: Path) -> list[dict[str, Any]]:
    """Return the counts of a pytest session, its failures by name, and what tests recorded as properties."""
    if not path.exists():
        return []
    suite = next(ElementTree.parse(path).iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    found: list[dict[str, Any]] = [{"name": "tests", "value": count, "ok": not count["failures"] + count["errors"]}]
    for case in suite.iter("testcase"):
        found += [
            {"name": f"failed: {case.get('name')}", "value": (bad.get("message") or "")[:200], "ok": False}
            for bad in (*case.iter("failure"), *case.iter("error"))
        ]
        found += [{"name": p.get("name"), "value": p.get("value"), "ok": None} for p in case.iter("property")]
    return found


def objective(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [{"name": "benchmark_objective.py", "value": json.loads(path.read_text()), "ok": None}]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    cuda = torch.cuda.is_available()
    return {
        "commit": commit or "no git repository",
        "device": torch.cuda.get_device_name() if cuda else "CPU (rehearsal: gloo, small models)",
        "python": sys.version.split()[0],
        **{package: version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    }


def write(work: Path, out: Path, seconds: int) -> int:
    """Write the results; return the exit code."""
    steps = []
    for line in (work / "steps.tsv").read_text().splitlines():
        name, code, took, limit = line.split("\t")
        found = [*findings(work / "logs" / f"{name}.log"), *junit(work / f"{name}.xml")]
        found += objective(work / "objective.json") if name == "objective" else []
        ok = code == "0" and all(finding["ok"] is not False for finding in found)
        steps.append(
            {"step": name, "ok": ok, "code": int(code), "seconds": int(took), "limit": int(limit), "findings": found}
        )
    versions = json.loads((work / "environment.json").read_text())
    result = {"environment": versions | {"seconds": seconds}, "steps": steps}
    (out / "check.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (out / "check.md").write_text(text)
    print(text)
    return int(not all(step["ok"] for step in steps))


def markdown(result: dict[str, Any]) -> str:
    lines = ["# GPU check", ""]
    lines += [f"- {name}: {value}" for name, value in result["environment"].items() if value is not None]
    lines += ["", "| step | result | seconds |", "| --- | --- | --- |"]
    for step in result["steps"]:
        verdict = "passed" if step["ok"] else "FAILED" if step["code"] != 124 else f"FAILED (limit {step['limit']} s)"
        lines.append(f"| {step['step']} | {verdict} | {step['seconds']} |")
    for step in result["steps"]:
        rows = [finding for finding in step["findings"] if finding["name"] != "benchmark_objective.py"]
        tables = [finding["value"] for finding in step["findings"] if finding["name"] == "benchmark_objective.py"]
        if rows or tables:
            lines += ["", f"## {step['step']}", ""]
        if rows:
            lines += ["| finding | value | |", "| --- | --- | --- |"]
            marks = {True: "ok", False: "**wrong**", None: ""}
            lines += [f"| {row['name']} | {_cell(row['value'])} | {marks[row['ok']]} |" for row in rows]
        for table in tables:
            lines += _objective_table(table)
    return "\n".join(lines) + "\n"


def _objective_table(table: Any) -> list[str]:
    rows = [row for row in (table.get("rows", []) if isinstance(table, dict) else table) if isinstance(row, dict)]
    if not rows:
        return []
    columns = list(rows[0])
    body = [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
    return ["", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}", *body]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(map(_cell, value))
    return str(value).replace("|", "/")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "compare":
        compare(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
    elif command == "speed":
        speed(*map(Path, arguments))
    elif command == "environment":
        print(json.dumps(environment()))
    else:
        sys.exit(write(Path(arguments[0]), Path(arguments[1]), int(arguments[2])))
