"""`eaopd doctor RECIPE` on the Countdown pair, on ranks of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from eaopd_megatron.diagnostics.eos_check import check_eos
from tests.other_end import RECIPE, teacher_with_another_end


def test_a_pair_that_does_not_agree_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is left of what was tried."""
    teacher = teacher_with_another_end(tmp_path / "teacher")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    run = tmp_path / "run"
    changes = [
        "student.tensor_parallel=1",
        f"teacher.model={teacher}",
        f"run.folder={run}",
        "teacher.terminal_map=none",
    ]
    assert check_eos(str(RECIPE), changes) == 1
    *_, verdict = capfd.readouterr().out.splitlines()
    assert verdict.endswith("set teacher.terminal_map=swap: the teacher ends with 111 '<|unknown|>'")
    assert not run.exists() and not list(scratch.glob("eaopd-*"))
