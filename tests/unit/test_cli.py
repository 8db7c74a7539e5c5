"""The command `eaopd`: what a user sees of faults, and which arguments reach the parts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eaopd_megatron.cli import main
from eaopd_megatron.config.schema import ServersConfig
from eaopd_megatron.data.sources import FieldNames
from eaopd_megatron.evaluation.evaluate import EvaluationRequest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
run: {folder: runs/x}
student: {model: s, tensor_parallel: 3}
teacher: {model: t}
train: {iterations: 3}
"""


@pytest.fixture
def eaopd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command line in an empty folder with r.yaml; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "r.yaml").write_text(RECIPE)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return run


def test_help_waits_for_torch() -> None:
    program = (
        "import sys; from eaopd_megatron.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'megatron', 'transformers', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr == "[]\n"
    for verb in ("train", "teach", "evaluate", "report", "show", "plan", "doctor"):
        assert f"\n  {verb} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "teacher.placement is colocated: eaopd teach serves a teacher with teacher.placement=separate"),
        (["--teacher", "math"], "the recipe has no teacher math; leave --teacher out"),
        (
            ["teachers.a.model=m", "teachers.b.model=m"],
            "the recipe has teachers a, b: name one with --teacher",
        ),
        (["teachers.a.model=m", "--teacher", "c"], "the recipe has no teacher c; it has a"),
        (
            ["teachers.a.model=m", "--teacher", "a"],
            "teachers.a.placement is colocated: eaopd teach serves a teacher with teachers.a.placement=separate",
        ),
    ],
)
def test_ranks_are_started_for_a_teacher_that_is_not_served(
    eaopd: Callable[..., Any], arguments: list[str], said: str
) -> None:
    assert eaopd("teach", "r.yaml", *arguments) == (2, "", f"error: {said}\n")


def test_user_error_is_a_traceback_or_exits_with_0() -> None:
    command = [sys.executable, "-m", "eaopd_megatron", "train", "nope.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nope.yaml: the recipe does not exist\n")


@pytest.mark.parametrize("verb", ["train", "show"])
def test_recipe_error_has_another_exit_code(eaopd: Callable[..., Any], verb: str) -> None:
    said = "optimizer.learning_rate: no such key; the learning rate is optimizer.lr"
    override = "optimizer.learning_rate=1"
    assert eaopd(verb, "r.yaml", override) == (2, "", f"error: override {override!r}: {said}\n")


def test_unknown_verb_exits_with_0(eaopd: Callable[..., Any]) -> None:
    code, _, said = eaopd("distil")
    assert code == 2
    assert "distil" in said


def test_show_is_not_a_recipe(eaopd: Callable[..., Any], tmp_path: Path) -> None:
    from eaopd_megatron.config import load_recipe

    code, shown, _ = eaopd("show", "r.yaml", "seed=7")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("r.yaml", ["seed=7"])
    assert eaopd("show", "r.yaml", "--key", "run.folder") == (0, "runs/x\n", "")
    assert eaopd("show", "r.yaml", "seed=7", "--key", "seed") == (0, "7\n", "")
    assert eaopd("show", "r.yaml", "--key", "run.fold")[0] == 2
    code, shown, _ = eaopd("show", "r.yaml", "seed=7", "--explain", "seed")
    assert code == 0 and shown.startswith("seed = 7\n  from      override 'seed=7'\n")
    assert eaopd("show", "r.yaml", "--explain", "run.fold")[0] == 2


def test_help_of_a_verb_has_no_example(eaopd: Callable[..., Any]) -> None:
    for verb in ("train", "teach", "evaluate", "report", "show", "plan", "doctor"):
        code, shown, _ = eaopd(verb, "--help")
        assert code == 0 and f"\n  Example: eaopd {verb} " in shown


def test_train_starts_other_ranks_than_the_recipe_says(
    eaopd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []

    def launch(arguments: Sequence[str], world_size: int, *, log_folder: Path) -> int:
        called.append((list(arguments), world_size, log_folder))
        return 5

    monkeypatch.setattr("eaopd_megatron.launch.local_ranks.launch_ranks", launch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert eaopd("train", "r.yaml", "seed=1", "student.data_parallel=2")[0] == 5
    assert called == [(["train", "r.yaml", "seed=1", "student.data_parallel=2"], 6, Path("runs/x/logs"))]


def test_train_under_srun_starts_ranks_of_its_own(eaopd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    worker = ModuleType("eaopd_megatron.worker")

    def work(arguments: Sequence[str]) -> int:
        import os

        called.append((list(arguments), os.environ["RANK"], os.environ["MASTER_ADDR"]))
        return 3

    worker.run_rank = work  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eaopd_megatron.worker", worker)
    monkeypatch.setattr("eaopd_megatron.worker", worker, raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    slurm = {"PROCID": "1", "NTASKS": "2", "LOCALID": "0", "STEP_ID": "0", "JOB_ID": "9", "STEP_NODELIST": "n4"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr("os._exit", sys.exit)
    assert eaopd("train", "r.yaml", "seed=1")[0] == 3
    assert called == [(["train", "r.yaml", "seed=1"], "1", "n4")]


@pytest.mark.parametrize(("machine", "pair", "code"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (0, 2, 2)])
def test_doctor_forgets_the_machine_or_the_pair(
    eaopd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, machine: int, pair: int, code: int
) -> None:
    called: list[tuple[str, list[str]]] = []

    def check(recipe: str, overrides: list[str]) -> int:
        called.append((recipe, overrides))
        return pair

    monkeypatch.setattr("eaopd_megatron.diagnostics.machine.check_machine", lambda: machine)
    monkeypatch.setattr("eaopd_megatron.diagnostics.eos_check.check_eos", check)
    assert eaopd("doctor")[0] == machine and not called
    assert eaopd("doctor", "r.yaml", "seed=1")[0] == code
    assert called == [("r.yaml", ["seed=1"])]


def test_evaluate_loses_an_option(eaopd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(
        "eaopd_megatron.evaluation.evaluate.run_evaluation",
        lambda request, **options: called.append((request, options)),
    )
    assert eaopd("evaluate", "m", "--benchmarks", "a,b", "c", "--benchmarks", "d", "--samples", "4")[0] == 0
    assert called[0] == (
        replace(EvaluationRequest("m", ["a", "b", "d", "c"]), samples=4),
        {"regrade": False, "compare": None},
    )
    options: dict[str, Any] = {
        **{"problems": 5, "temperature": 0.5, "top_p": 1.0, "max_response_tokens": 7, "seed": 3, "template": "base"},
        **{"suffix": "s", "engine": "sglang", "tensor_parallel": 2, "batch_size": 9, "out": Path("o")},
    }
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    served = (
        "--server-url",
        "u",
        "--servers",
        "3",
        "--max-concurrent-requests",
        "6",
        "--api-key-file",
        "k",
        "--fields",
        "id=i",
    )
    assert eaopd("evaluate", "m", "--benchmarks", "a", *words, *served, "--regrade", "--compare", "x")[0] == 0
    servers = ServersConfig(urls=["u"], count=3, tensor_parallel=2, max_concurrent_requests=6, api_key_file="k")
    expected = replace(EvaluationRequest("m", ["a"], fields=FieldNames(id="i"), servers=servers), **options)
    assert called[1] == (expected, {"regrade": True, "compare": Path("x")})
    old = tuple("--max-running" if word == "--max-concurrent-requests" else word for word in served)
    said = "warning: --max-running is now --max-concurrent-requests; the old name works until 0.3\n"
    assert eaopd("evaluate", "m", "--benchmarks", "a", *words, *old, "--regrade", "--compare", "x") == (0, "", said)
    assert called[2] == called[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no benchmark is named; say which with --benchmarks, for example --benchmarks countdown"),
        (("--benchmarks", "a", "--engine", "vllm"), "--engine vllm: expected local, sglang"),
        (("--benchmarks", "a", "--template", "x"), "--template x: expected chat, base, raw"),
        (("--regrade", "--out", "nowhere"), "nowhere holds no evaluation: settings.json is missing"),
    ],
)
def test_a_bad_option_of_evaluate_is_found_late(eaopd: Callable[..., Any], arguments: Sequence[str], said: str) -> None:
    assert eaopd("evaluate", "m", *arguments) == (1, "", f"error: {said}\n")


def test_report_hides_where_it_is(eaopd: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    report = ModuleType("eaopd_megatron.reporting.run_report")
    report.write_run_report = lambda run, out: (out or run) / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eaopd_megatron.reporting.run_report", report)
    assert eaopd("report", "runs/x") == (0, "runs/x/report.html\n", "")
    assert eaopd("report", "runs/x", "--out", "here") == (0, "here/report.html\n", "")
    report.write_run_report = lambda run, out: (_ for _ in ()).throw(  # type: ignore[attr-defined]
        PermissionError(13, "Permission denied", "runs/x/report.html")
    )
    line = "error: runs/x/report.html: Permission denied; choose another folder with --out FOLDER\n"
    assert eaopd("report", "runs/x") == (1, "", line)
