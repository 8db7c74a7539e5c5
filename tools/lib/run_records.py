"""Read the metrics of a run that two runs of one seed have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MEASURED = ("time/", "throughput/", "memory/", "rollout/tokens_per_second")
"""Prefixes of metrics that depend on the machine, not on the seed."""


def records(run: Path) -> list[dict[str, Any]]:
    """Return the records in the run's metrics.jsonl without times, throughput and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(_MEASURED)} for line in lines]
