"""`eaopd evaluate` as a user starts it: killed, continued, graded again, refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from eaopd_megatron.rollout.sglang.server import SGLANG_VENV
from tests.end_to_end.runs import ROOT, Command, wait_for
from tests.sglang.student_double import stand_in

Start = Callable[..., Command]
STUDENT = str(ROOT / "recipes/countdown/student")
SMALL = ("--benchmarks", "countdown", "--problems", "12", "--samples", "4", "--max-response-tokens", "16")


def responses(folder: Path) -> list[str]:
    return sorted((folder / "generations/countdown.jsonl").read_text().splitlines())


def done(command: Command) -> str:
    code, out, err = command.wait()
    assert code == 0, err
    return out


def test_an_evaluation_that_was_killed_comes_to_other_results(eaopd: Start, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    table = done(eaopd("evaluate", STUDENT, *SMALL, "--batch-size", "8", "--out", str(whole)))
    assert "| countdown | 12 × 4 |" in table
    command = eaopd("evaluate", STUDENT, *SMALL, "--batch-size", "8", "--out", str(broken))
    kept = broken / "generations/countdown.jsonl"
    wait_for(lambda: kept.exists() and kept.stat().st_size > 0, command.process)
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait()
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:11]) + b'{"problem": 2, "samp')
    before = kept.read_bytes().splitlines()[:11]
    said = done(eaopd("evaluate", STUDENT, *SMALL, "--batch-size", "8", "--out", str(broken), "--compare", str(whole)))
    assert "37 of 48 responses are to be generated" in said
    assert "+0.0 [+0.0, +0.0]" in said
    assert kept.read_bytes().splitlines()[:11] == before
    assert responses(broken) == responses(whole)
    assert (broken / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert {"table.md", "pass_at_k.png"} <= {path.name for path in broken.iterdir()}

    # graded again without the model, and not mixed with responses to something else
    (broken / "results.json").unlink()
    done(eaopd("evaluate", "gone", "--regrade", "--out", str(broken)))
    assert (broken / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    code, _, err = eaopd("evaluate", STUDENT, *SMALL, "--seed", "7", "--out", str(broken)).wait()
    assert code == 1 and err.startswith(f"error: {broken} holds an evaluation with seed=1234, here it is 7: choose")


@pytest.mark.server
def test_servers_lose_responses_or_stay_behind(eaopd: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By doubles that hold the student."""
    monkeypatch.setenv(SGLANG_VENV, str(stand_in(tmp_path / "doubles")))
    out = tmp_path / "out"
    said = done(eaopd("evaluate", STUDENT, *SMALL, "--engine", "sglang", "--servers", "2", "--out", str(out)))
    assert "countdown: 48 of 48 responses" in said
    places = [(row["problem"], row["sample"]) for row in map(json.loads, responses(out))]
    assert sorted(places) == [(problem, sample) for problem in range(12) for sample in range(4)]
