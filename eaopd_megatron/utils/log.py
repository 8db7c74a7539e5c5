"""Log lines of the first rank."""

from __future__ import annotations

import os


def log_rank0(text: str) -> None:
    """Print a line on rank 0, or in a process without ranks; other ranks print nothing."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
