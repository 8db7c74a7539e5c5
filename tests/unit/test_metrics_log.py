"""A run's records survive crashes and resumes."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.reporting.metrics_log import MetricsWriter, read_metrics


def write_records(folder: Path, iterations: range, resume: int | None, **figures: Any) -> MetricsWriter:
    with MetricsWriter(folder, tensorboard=False, wandb=None, resume_iteration=resume) as writer:
        for iteration in iterations:
            writer.write({"iteration": iteration, "update": 4 * iteration, "objective/loss": 1.0, **figures})
    return writer


def iterations_of(folder: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(folder / "metrics.jsonl")]


def test_a_record_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb=None, resume_iteration=None)
    writer.write({"iteration": 1, "update": 4, "objective/loss": np.float32(0.5)})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 1, "update": 4, "objective/loss": 0.5}]
    writer.close()


def test_a_line_cut_by_a_crash_is_skipped_and_later_records_are_read(tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 4), None)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"iteration": 4, "upd')
    assert iterations_of(tmp_path) == [1, 2, 3]
    write_records(tmp_path, range(4, 6), 3)
    assert iterations_of(tmp_path) == [1, 2, 3, 4, 5]


def test_a_resumed_run_does_not_repeat_iterations(tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 8), None)
    write_records(tmp_path, range(6, 9), 5)
    assert iterations_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_new_run_removes_the_records_of_an_earlier_one(tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 8), None)
    write_records(tmp_path, range(1, 3), None)
    assert iterations_of(tmp_path) == [1, 2]


def test_a_damaged_line_in_the_middle_is_reported_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nrubbish\n{"iteration": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_nan_and_infinity_never_reach_the_file_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = write_records(tmp_path, range(1, 6), None, bad=float("nan"), worse=float("-inf"))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text and len(text.splitlines()) == 5
    assert writer.dropped == {"bad": 5, "worse": 5}
    assert "bad is nan at iteration 1 and is left out (time 1)" in caplog.messages
    assert len(caplog.records) == 6  # each at times 1, 2 and 4


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, end, resume in ((1, 7, None), (5, 9, 4)):
        with MetricsWriter(tmp_path, tensorboard=True, wandb=None, resume_iteration=resume) as writer:
            for iteration in range(start, end):
                writer.write({"iteration": iteration, "update": iteration, "objective/loss": float(start)})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # type: ignore[no-untyped-call]
    assert [(event.step, event.value) for event in events.Scalars("objective/loss")] == [
        *((step, 1.0) for step in range(1, 5)),
        *((step, 5.0) for step in range(5, 9)),
    ]


@pytest.mark.parametrize(
    ("package", "options"), [("wandb", (False, {"project": "p"})), ("torch.utils.tensorboard", (True, None))]
)
def test_a_missing_sink_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, options: tuple[bool, dict[str, Any] | None]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, package.rpartition(".")[2], None)
    with pytest.raises(UserError, match=r"reporting\.\w+: the package \w+ is missing; pip install"):
        MetricsWriter(tmp_path, *options, resume_iteration=None)


def test_a_broken_sink_is_told_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import not_there_either")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"wandb is installed and cannot be imported \(ModuleNotFoundError: No module"):
        MetricsWriter(tmp_path, False, {"project": "p"}, resume_iteration=None)


def test_wandb_continues_the_same_run_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, Any]] = []
    logged: list[dict[str, Any]] = []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: None, define_metric=lambda *args, **kwargs: None)

    def init(**options: Any) -> types.SimpleNamespace:
        starts.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume in (None, 1, None):
        options = {"project": "eaopd", "name": "n", "config": {"seed": 0}}
        with MetricsWriter(tmp_path, tensorboard=False, wandb=options, resume_iteration=resume) as writer:
            writer.write({"iteration": 2, "update": 8, "objective/loss": 1.0})
    assert starts[0]["id"] == starts[1]["id"] != starts[2]["id"]
    assert starts[0]["project"] == "eaopd" and starts[0]["resume"] == "allow"
    assert logged[0] == {"iteration": 2, "update": 8, "objective/loss": 1.0}
