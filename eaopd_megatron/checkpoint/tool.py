"""What the conversion tools share: errors of the user in one line, the libraries' warnings left out."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from eaopd_megatron.errors import UserError
from eaopd_megatron.launch import ERROR_FILE


def say(text: str) -> None:
    """A progress line, from the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def run(work: Callable[[], int]) -> int:
    """The exit code of `work`. A UserError becomes one line: on stderr, or in a launched rank's error file."""
    # about optional packages, and about names that torch and Megatron-Core mean to change
    warnings.simplefilter("ignore")
    try:
        return work()
    except UserError as error:
        base, rank = os.environ.get(ERROR_FILE), int(os.environ.get("RANK", "0"))
        if base is None:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            record = {
                "message": str(error),
                "exit_code": error.exit_code,
                "rank": rank,
                "user": True,
                "time": time.time(),
            }
            path = Path(f"{base}.{rank}")
            path.with_suffix(f".{rank}.tmp").write_text(json.dumps(record))
            path.with_suffix(f".{rank}.tmp").replace(path)
        return error.exit_code
