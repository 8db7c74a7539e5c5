"""The campaign of kills of the teacher, in short, and what its comparison must not miss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools.campaign_teacher import differences

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, records: list[dict[str, Any]], responses: str = "[1, 2]") -> Path:
    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "rollouts" / "000001.jsonl").write_text(responses)
    return folder


RECORDS: list[dict[str, Any]] = [{"iteration": 0}, {"iteration": 1, "objective/loss": 0.5, "time/teacher": 1.0}]


@pytest.mark.parametrize(
    ("records", "responses", "said"),
    [
        (RECORDS[:1], "[1, 2]", "1 records of metrics, not 2"),
        (
            [RECORDS[0], RECORDS[1] | {"objective/loss": 0.5000000000000001}],
            "[1, 2]",
            "objective/loss is 0.5000000000000001",
        ),
        ([RECORDS[0], RECORDS[1] | {"more": 1}], "[1, 2]", "iteration 1: more is 1, not None"),
        (RECORDS, "[1, 3]", "the responses in rollouts/000001.jsonl differ"),
    ],
)
def test_a_run_that_changed_passes(tmp_path: Path, records: list[dict[str, Any]], responses: str, said: str) -> None:
    quiet = write(tmp_path / "quiet", RECORDS)
    slower = [RECORDS[0], RECORDS[1] | {"time/teacher": 9.0}]
    assert differences(write(tmp_path / "slower", slower), quiet) == []
    (found,) = differences(write(tmp_path / "changed", records, responses), quiet)
    assert said in found


@pytest.mark.server
@pytest.mark.timeout(600)
def test_a_killed_teacher_changes_a_figure(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/campaign_teacher.py",
        "--kills",
        "2",
        "--iterations",
        "8",
        "--folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "report.json").read_text())["kills"]) == 2
