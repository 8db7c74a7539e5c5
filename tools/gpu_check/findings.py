"""One line per finding of a step, which `report.py` collects from the step's log."""

from __future__ import annotations

import json
from typing import Any

PREFIX = "finding "


def record(name: str, value: Any, ok: bool | None = None) -> None:
    """Print a finding. ok: whether it is as it must be; None where there is nothing to judge."""
    print(PREFIX + json.dumps({"name": name, "value": value, "ok": ok}), flush=True)
