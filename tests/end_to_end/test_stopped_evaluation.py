"""A run that receives a stop signal during an evaluation, or while its own ranks generate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.end_to_end.runs import ROOT, SMALL, Command
from tools.lib.run_records import records

RECIPE = "recipes/countdown/eopd.yaml"
# One rank whose evaluation at an iteration raises what a stop signal raises during generation by servers.
STOP_DURING_EVALUATION = """
import os, sys
from eaopd_megatron import worker
from eaopd_megatron.config import load_recipe
from eaopd_megatron.evaluation.runner import Evaluator
from eaopd_megatron.errors import StopRequested

run_completely = Evaluator.run
def run(self, iteration, *others):
    if iteration == int(sys.argv[1]):
        raise StopRequested(15)
    return run_completely(self, iteration, *others)
Evaluator.run = run
try:
    worker._train(load_recipe(sys.argv[2], sys.argv[3:]))
except SystemExit as end:
    sys.stderr.flush()
    os._exit(end.code)  # as a rank does
"""

# One rank that gets SIGTERM in the middle of an iteration's generation.
STOP_DURING_GENERATION = """
import os, signal, sys
from eaopd_megatron import worker
from eaopd_megatron.config import load_recipe
from eaopd_megatron.rollout.local import LocalRollout

draw, drawn = LocalRollout._draw, [0]
def counted(self, *arguments):
    drawn[0] += self._version == int(sys.argv[1])
    if drawn[0] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    assert drawn[0] < 30, "generates on"
    return draw(self, *arguments)
LocalRollout._draw = counted
try:
    worker._train(load_recipe(sys.argv[2], sys.argv[3:]))
except SystemExit as end:
    sys.stderr.flush()
    os._exit(end.code)  # as a rank does
"""


def stop_in_evaluation(iteration: int, *overrides: str) -> None:
    stop_in(STOP_DURING_EVALUATION, iteration, *overrides)


def stop_in(program: str, when: int, *overrides: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, **rank, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(when), RECIPE, *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 128 + 15, done.stderr


def test_a_run_stopped_during_an_evaluation_resumes_to_the_same_metrics(
    eaopd: Callable[..., Command], tmp_path: Path
) -> None:
    """Stopped in a middle and in the last evaluation: metrics are recorded, and the evaluation is repeated."""
    stopped, complete = tmp_path / "stopped", tmp_path / "complete"
    overrides = [*SMALL, "student.tensor_parallel=1"]
    for iteration in (3, 6):
        stop_in_evaluation(iteration, *overrides, f"run.folder={stopped}")
    for run in (stopped, complete):
        code, _, err = eaopd("train", RECIPE, *overrides, f"run.folder={run}").wait()
        assert code == 0, err
    merged: dict[int, dict[str, object]] = {}
    for record in records(stopped):
        merged.setdefault(record["iteration"], {}).update(record)
    assert list(merged.values()) == records(complete)
    for name in ("000003.json", "000006.json"):
        one, other = (json.loads((run / "evaluation" / name).read_text()) for run in (stopped, complete))
        assert one["benchmarks"] == other["benchmarks"]
    one, other = (json.loads((run / "finished.json").read_text()) for run in (stopped, complete))
    assert one == other


def test_a_run_stopped_while_it_generates_redoes_the_iteration_bit_for_bit(
    eaopd: Callable[..., Command], tmp_path: Path
) -> None:
    """Generation ends at the signal, long before its iteration, and the completed iterations are saved."""
    stopped, complete = tmp_path / "stopped", tmp_path / "complete"
    overrides = [*SMALL, "student.tensor_parallel=1", "run.save_interval=0", "evaluation.benchmarks=[]"]
    stop_in(STOP_DURING_GENERATION, 6, *overrides, f"run.folder={stopped}")
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_000002"]
    for run in (stopped, complete):
        code, _, err = eaopd("train", RECIPE, *overrides, f"run.folder={run}").wait()
        assert code == 0, err
    assert records(stopped) == records(complete)
    one, other = ((run / "student/model.safetensors").read_bytes() for run in (stopped, complete))
    assert one == other
