"""The GPU check's rehearsal on a CPU: what a borrowed GPU gets to run must not fail for reasons of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["update_group", "real_width"]  # the others start runs as other tests do


@pytest.mark.server
@pytest.mark.timeout(1200)
def test_no_step_of_the_rehearsal_fails(tmp_path: Path) -> None:
    environment = os.environ | {"EAOPD_VENV": sys.prefix}
    command = ["bash", "tools/gpu_check.sh", "--rehearse", "--out", str(tmp_path), "--steps", " ".join(STEPS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {step["step"]: step for step in json.loads((tmp_path / "check.json").read_text())["steps"]}
    assert sorted(steps) == sorted(STEPS) and all(step["ok"] for step in steps.values()), done.stdout
    names = {finding["name"] for step in steps.values() for finding in step["findings"]}
    assert "a broadcast to a dead server" in names and "throughput/tokens_per_second" in names
