"""Why a step of ranks failed: which rank first, with which code, and what it said last, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from eaopd_megatron.launch.local_ranks import read_error_reports

LINES = 20
_SIGNALS = {
    "Killed": 9,
    "Out Of Memory": 9,
    "Segmentation fault": 11,
    "Bus error": 7,
    "Aborted": 6,
    "Illegal instruction": 4,
    "Floating point exception": 8,
}
_EVENT = re.compile(
    r"srun: error: (?P<node>[\w.-]+): tasks? (?P<tasks>[\d,-]+): "
    rf"(?:Exited with exit code (?P<code>\d+)|(?P<how>{'|'.join(_SIGNALS)}))"
)
TERMINATED = 128 + 15
"""Code of ranks that srun ended because another had failed, and of those that saved their state at a SIGTERM."""
ASKED = (TERMINATED, 128 + 10)
"""Codes with which ranks say that they stopped because a signal asked them to."""


@dataclass(frozen=True)
class Verdict:
    """code: of the failing rank; 0: none failed, the ranks were asked to stop. user: whether it is the user's fault,
    which another start would not mend."""

    code: int
    text: str
    user: bool


def verdict(srun: str, errors: Path, logs: Path, code: int) -> Verdict:
    """srun: what the step's srun said. errors: folder of the ranks' own reports. logs: folder of rank_N.log. code:
    the step's."""
    reports = read_error_reports(errors)
    mine = next((report for report in reports if report.get("user")), None)
    if mine is not None:
        found = int(mine.get("exit_code", 1)) or 1
        return Verdict(found, f"error: {_one_line(mine['message'])} (rank {mine['rank']}, exit code {found})", True)
    if not reports and code in ASKED and all(int(seen["code"] or 0) in ASKED for seen in _EVENT.finditer(srun)):
        return Verdict(0, "the ranks were asked to stop and saved their state", False)
    rank, code, how = _first(srun, reports[0]["rank"] if reports else None, code)
    if rank is None:
        return Verdict(code, "\n".join([f"error: the step ended with exit code {code}", *_tail(srun)]), False)
    said = next((f": {_one_line(report['message'])}" for report in reports if report["rank"] == rank), "")
    log = logs / f"rank_{rank}.log"
    lines = _tail(_end(log))
    head = f"error: rank {rank} {how}{said}; the last lines of {log}:"
    return Verdict(code, "\n".join([head, *(f"  | {line}" for line in lines)]), False)


def _first(srun: str, reporting: int | None, code: int) -> tuple[int | None, int, str]:
    """(rank, exit code, how) of what failed first: what srun saw first, or the rank that reported first an error."""
    seen = [
        (int(re.split("[,-]", event["tasks"])[0]), int(event["code"] or 128 + _SIGNALS[event["how"]]), event)
        for event in _EVENT.finditer(srun)
    ]
    seen = [one for one in seen if one[1] != TERMINATED] or seen
    if not seen:
        return reporting, code, f"ended with exit code {code}"
    if not seen[0][2]["how"]:  # a rank that is killed reports nothing, and brings others down who do
        seen = [one for one in seen if one[0] == reporting] or seen
    rank, code, event = seen[0]
    how = f"was killed ({event['how']})" if event["how"] else f"ended with exit code {code}"
    return rank, code, f"{how} on {event['node']}"


def _end(log: Path) -> str:
    try:
        return log.read_bytes()[-65536:].decode("utf-8", errors="replace")
    except OSError:
        return ""


def _tail(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()][-LINES:]


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
