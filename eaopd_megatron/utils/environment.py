"""The environment of a run: package versions, commit and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def git_commit() -> str | None:
    """Return the checkout's commit, with "-dirty" if it has uncommitted changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment() -> dict[str, Any]:
    """Return JSON values: Python, platform, `git_commit`, command line, CPUs, GPUs, CUDA and package versions."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git_commit(),
        "command": sys.argv,
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
        "packages": dict(sorted(package_versions().items(), key=lambda item: item[0].lower())),
    }


def package_versions() -> dict[str, str]:
    """Return the version of each package as it is imported: the first on sys.path, should two folders have it."""
    installed: dict[str, str] = {}
    for one in metadata.distributions():
        if name := one.metadata["Name"]:
            installed.setdefault(name, one.version)
    return installed
