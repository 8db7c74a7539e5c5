"""`eaopd doctor`: what this machine has, what is missing or harmful, and the remedies.

Facts are gathered first, those about torch and Megatron-Core in a process of their own, so that a package that breaks
an import (an incomplete transformer-engine does) becomes a finding. Changes nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from eaopd_megatron.errors import UserError, one_line

if TYPE_CHECKING:
    from eaopd_megatron.config import Recipe

PROJECT = "eaopd-megatron"
_SHOWN_PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "psutil")
_OPTIONAL_PACKAGES = {
    "transformer-engine": "fused layers on GPUs",
    "sglang": "rollout on inference servers",
}
_MIN_FREE_BYTES = 2 * 2**30
"""Free disk space below which a run's checkpoints are at risk."""
_PROBE_SECONDS = 180

_PROBE = """
import json, sys
facts = {}
try:
    import torch
    import torch.distributed as dist
    facts["torch"] = torch.__version__
    facts["cuda_build"] = torch.version.cuda
    facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["backends"] = [b for b in ("gloo", "nccl") if getattr(dist, f"is_{b}_available")()]
except Exception as error:
    facts["torch_error"] = f"{type(error).__name__}: {error}"
print(json.dumps(facts), flush=True)
try:
    import megatron.core
    import megatron.core.models.gpt
    print(json.dumps({"megatron": megatron.core.__version__}), flush=True)
except Exception as error:
    print(json.dumps({"megatron_error": f"{type(error).__name__}: {error}"}), flush=True)
"""

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class MachineFacts:
    """What was detected. Memory and disk in bytes."""

    python: tuple[int, int, int]
    packages: dict[str, str | None]  # required, shown and optional ones; None: not installed
    requirements: tuple[str, ...]  # of the project, without extras
    probe: dict[str, Any]  # output of the probe
    cpus: int
    memory: int | None
    driver_gpus: tuple[str, ...]  # listed by nvidia-smi
    disk_free: int
    folder: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One line: subject, what was detected, and the remedy."""

    level: Level
    subject: str
    detail: str
    remedy: str = ""


def _ok(subject: str, detail: str) -> Finding:
    return Finding("ok", subject, detail)


def _problem(subject: str, detail: str, remedy: str) -> Finding:
    return Finding("problem", subject, detail, remedy)


def check_machine() -> int:
    """Print the findings. Return 1 if one of them is a problem, else 0."""
    findings = judge_facts(gather_facts())
    _print(findings)
    return int(any(finding.level == "problem" for finding in findings))


def check_servers(recipe: Recipe) -> int:
    """Print how NCCL runs in the servers of `servers.urls`. Return 1 if one differs from the trainer, else 0."""
    config = recipe.servers
    if recipe.rollout.engine != "sglang" or recipe.weight_sync.transport != "distributed" or not config.urls:
        return 0
    from eaopd_megatron.serving.http import Busy, EventLoopThread, ServerGone, SGLangClient, read_api_key
    from eaopd_megatron.utils.gpu_environment import nccl_difference, update_group_environment

    key = None if config.api_key_file is None else read_api_key(Path(config.api_key_file))
    ours = " ".join(f"{name}={value}" for name, value in update_group_environment().items())
    findings = []
    with EventLoopThread() as loop:
        for url in config.urls:
            client = SGLangClient(url, api_key=key)
            try:
                info = loop.run(client.server_info())
            except (ServerGone, Busy, UserError) as error:
                findings.append(_problem(url, str(error), "start it, or correct servers.urls"))
                continue
            finally:
                loop.run(client.close())
            if difference := nccl_difference(url, info):
                what, _, remedy = difference.partition(": export ")
                findings.append(_problem(url, what.removeprefix(f"{url} "), f"export {remedy}"))
            elif info.get("device") != "cpu":
                detail = (
                    f"its options leave NCCL to its environment, where {ours} must hold as here (or be unset, if 0)"
                )
                findings.append(_ok(url, detail))
    _print(findings)
    return int(any(finding.level == "problem" for finding in findings))


def gather_facts() -> MachineFacts:
    """Inspect this machine and Python environment. Takes as long as importing torch and Megatron-Core."""
    requirements = _requirements()
    names = {Requirement(text).name for text in requirements} | set(_SHOWN_PACKAGES) | set(_OPTIONAL_PACKAGES)
    folder = Path.cwd()
    return MachineFacts(
        python=sys.version_info[:3],
        packages={name: _version(name) for name in sorted(names)},
        requirements=requirements,
        probe=_probe(),
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        driver_gpus=_driver_gpus(),
        disk_free=shutil.disk_usage(folder).free,
        folder=str(folder),
        environment={name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
    )


def _requirements() -> tuple[str, ...]:
    """Return the dependencies in pyproject.toml, read from the checkout or else from the installed package."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        return _for_this_platform(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    try:
        declared = metadata.requires(PROJECT) or []
    except metadata.PackageNotFoundError:
        return ()
    return _for_this_platform(declared)


def _for_this_platform(declared: Sequence[str]) -> tuple[str, ...]:
    markers = {text: Requirement(text).marker for text in declared}
    return tuple(text for text, marker in markers.items() if marker is None or marker.evaluate({"extra": ""}))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _probe(command: Sequence[str] = (sys.executable, "-c", _PROBE)) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"probe_error": f"the imports did not end in {_PROBE_SECONDS} s"}
    facts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        facts["probe_error"] = f"the imports ended with exit code {done.returncode}: {last}"
    return facts


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _driver_gpus() -> tuple[str, ...]:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.partition(" (UUID")[0] for line in listed.stdout.splitlines() if line.startswith("GPU "))


def judge_facts(facts: MachineFacts) -> list[Finding]:
    """Return all findings, those about the machine first."""
    return [*_machine(facts), *_packages(facts), *_devices(facts), *_imports(facts), *_optional(facts)]


def _machine(facts: MachineFacts) -> list[Finding]:
    python = ".".join(map(str, facts.python))
    findings = [
        _ok("python", f"{python} on {platform.system()} {platform.machine()}")
        if facts.python >= (3, 11)
        else _problem("python", python, "use Python 3.11: set EAOPD_PYTHON to it and make the environment anew")
    ]
    memory = f", {facts.memory / 2**30:.0f} GiB of memory" if facts.memory else ""
    threads = facts.environment.get("OMP_NUM_THREADS")
    findings.append(_ok("processors", f"{facts.cpus}{memory}" + (f", OMP_NUM_THREADS={threads}" if threads else "")))
    free = f"{facts.disk_free / 2**30:.1f} GiB free for {facts.folder}"
    findings.append(
        _ok("disk", free)
        if facts.disk_free >= _MIN_FREE_BYTES
        else _problem(
            "disk", free, f"free at least {_MIN_FREE_BYTES / 2**30:.0f} GiB, or put run.folder on another disk"
        )
    )
    return findings


def _packages(facts: MachineFacts) -> list[Finding]:
    """Compare installed packages with the requirements; satisfied ones are listed only if in _SHOWN_PACKAGES."""
    findings = []
    for requirement in map(Requirement, facts.requirements):
        name, version = requirement.name, facts.packages.get(requirement.name)
        install = f'python -m pip install "{requirement}"'
        if version is None:
            why = ": without it Megatron-Core's checkpoints hang" if name == "psutil" else ""
            findings.append(_problem(name, f"not installed{why}", install))
        elif not requirement.specifier.contains(version, prereleases=True):
            findings.append(_problem(name, f"{version}, but {requirement} is needed", install))
        elif name in _SHOWN_PACKAGES:
            findings.append(_ok(name, version))
    needed = {Requirement(text).name for text in facts.requirements}
    return findings + [
        _ok(name, facts.packages[name] or "")
        for name in _SHOWN_PACKAGES
        if name not in needed and facts.packages.get(name)
    ]


def _devices(facts: MachineFacts) -> list[Finding]:
    probe, listed = facts.probe, facts.driver_gpus
    if "torch" not in probe:
        return [_problem("devices", f"{len(listed)} GPUs by nvidia-smi; torch cannot be asked", "mend torch first")]
    gpus, build = probe.get("gpus", []), probe.get("cuda_build")
    backends = probe.get("backends", [])
    if gpus:
        names = ", ".join(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus)))
        findings = [_ok("devices", f"{names}, CUDA {build}")]
    elif listed and build is None:
        remedy = "install the CUDA build of the same torch version (`eaopd` uses the GPUs that torch sees)"
        findings = [_problem("devices", f"{len(listed)} GPUs by nvidia-smi, but torch is a CPU build", remedy)]
    elif listed:
        remedy = f"update the driver to one for CUDA {build}, and look at CUDA_VISIBLE_DEVICES"
        findings = [_problem("devices", f"{len(listed)} GPUs by nvidia-smi, but torch sees none", remedy)]
    else:
        findings = [_ok("devices", "CPU only")]
    missing = [name for name in ("gloo", *(["nccl"] if gpus else [])) if name not in backends]
    if missing:
        remedy = "install the torch of pyproject.toml from its official wheels"
        findings.append(_problem("backends", f"{', '.join(missing)} missing in this torch", remedy))
    else:
        findings.append(_ok("backends", ", ".join(backends)))
    return findings


def _imports(facts: MachineFacts) -> list[Finding]:
    probe = facts.probe
    if "torch_error" in probe:
        return [
            _problem("import torch", one_line(probe["torch_error"], 160), "install the torch of pyproject.toml anew")
        ]
    if "megatron" in probe:
        return [_ok("import megatron.core", "works")]
    detail = one_line(probe.get("megatron_error") or probe.get("probe_error") or "no answer", 160)
    if facts.packages.get("transformer-engine") and re.search("transformer.engine|cudnn", detail, re.IGNORECASE):
        return [_problem("import megatron.core", detail, "python -m pip uninstall transformer-engine")]
    return [_problem("import megatron.core", detail, "mend the packages above, then make the environment anew")]


def _optional(facts: MachineFacts) -> list[Finding]:
    findings = []
    for name, use in _OPTIONAL_PACKAGES.items():
        version = facts.packages.get(name)
        if version is None:
            findings.append(Finding("note", name, f"not installed ({use})"))
        elif name == "transformer-engine" and not (facts.probe.get("gpus") or facts.driver_gpus):
            remedy = "python -m pip uninstall transformer-engine: without a GPU it breaks the import of Megatron-Core"
            findings.append(_problem(name, f"{version} on a machine without a GPU", remedy))
        else:
            findings.append(_ok(name, version))
    return findings


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console, problems = Console(), [finding for finding in findings if finding.level == "problem"]
    for finding in findings:
        mark, style = {"ok": (" ", ""), "note": ("-", "dim"), "problem": ("!", "bold red")}[finding.level]
        console.print(Text(f"{mark} {finding.subject}: {finding.detail}", style), soft_wrap=True)
    for finding in problems:
        print(f"! {finding.subject}: {finding.remedy}")
    print("nothing is missing or harmful" if not problems else f"{len(problems)} to mend")
