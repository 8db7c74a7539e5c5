"""Progress lines from the first rank."""

from __future__ import annotations

import os


def log_rank0(text: str) -> None:
    """A progress line, from the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
