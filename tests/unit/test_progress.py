"""The display of a run on a terminal, in a log file and in log.txt."""

import re
from io import StringIO
from pathlib import Path

import numpy as np
from rich.console import Console

from eaopd_megatron.reporting.progress import Progress
from tests.unit.example_runs import make_record


def show_progress(tmp_path: Path, *, terminal: bool, seconds: float, count: int = 6) -> tuple[str, str]:
    """Return output and log.txt of `count` iterations of `seconds` each."""
    now = [100.0]
    console = Console(file=StringIO(), force_terminal=terminal, width=140)
    log = tmp_path / "log.txt"
    with Progress(count, 0, log, console, clock=lambda: now[0]) as progress:
        progress.message("loading [teacher] from t/[x]")
        progress.update(
            {"iteration": 0, "update": 0, "evaluation/countdown/pass@1": 0.081, "evaluation/countdown/pass@8": 0.4}
        )
        for iteration in range(1, count + 1):
            now[0] += seconds
            progress.update(make_record(iteration, count, np.random.default_rng(0)))
    output = console.file
    assert isinstance(output, StringIO)
    return output.getvalue(), log.read_text()


def test_without_a_terminal_fast_iterations_share_plain_lines(tmp_path: Path) -> None:
    output, log = show_progress(tmp_path, terminal=False, seconds=1.0, count=12)
    assert "\x1b" not in output
    shown = re.findall(r"iteration (\d+)/12", output)
    assert shown == ["1", "6", "11", "12"]
    assert re.findall(r"iteration (\d+)/12", log) == shown
    assert "loading [teacher] from t/[x]" in output and "loading [teacher] from t/[x]" in log
    assert re.search(r"before training: countdown pass@1 0\.081 pass@8 0\.400", output)
    assert re.search(
        r"iteration 6/12  loss [\d.]+  reverse KL [\d.]+  gated forward KL .* tokens/s [\d,]+  0:00:06 left", output
    )
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in output.splitlines())


def test_slow_iterations_have_a_line_each(tmp_path: Path) -> None:
    output, _ = show_progress(tmp_path, terminal=False, seconds=60.0)
    assert len(re.findall(r"iteration \d+/6", output)) == 6
    assert "0:04:00 left" in output


def test_a_terminal_has_a_bar_with_the_main_figures_and_the_log_has_lines(tmp_path: Path) -> None:
    output, log = show_progress(tmp_path, terminal=True, seconds=10.0)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "6/6" in plain and "reverse KL" in plain and "last evaluation  countdown pass@1 0.081" in plain
    assert len(re.findall(r"iteration \d+/6", log)) == 6
