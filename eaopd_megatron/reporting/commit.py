"""Which commit of the project runs."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str | None:
    """With "-dirty" where the checkout has changes that are not in it; None outside of a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
