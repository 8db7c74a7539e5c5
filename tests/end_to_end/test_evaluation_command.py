"""`eaopd evaluate`: resumed after a kill, graded again, refused, and with servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.evaluate import EvaluationRequest, run_evaluation
from eaopd_megatron.evaluation.folder import EvaluationFolder, SampleIndex
from eaopd_megatron.evaluation.grading import DecodedResponse
from eaopd_megatron.launch import local_ranks
from eaopd_megatron.rollout.sglang.server import SGLANG_VENV_VARIABLE
from tests.end_to_end.runs import ROOT, Command
from tools.sglang_double.student import stand_in

Start = Callable[..., Command]
STUDENT = str(ROOT / "recipes/countdown/student")
SMALL = ("--benchmarks", "countdown", "--problems", "12", "--samples", "4", "--max-response-tokens", "16")


def responses(folder: Path) -> list[str]:
    return sorted((folder / "generations/countdown.jsonl").read_text().splitlines())


def done(command: Command) -> str:
    code, out, err = command.wait()
    assert code == 0, err
    return out


def test_a_killed_evaluation_is_resumed_to_the_same_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is cut to what a kill leaves: complete lines and an incomplete one."""
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    request = EvaluationRequest(STUDENT, ["countdown"], 4, 12, max_response_tokens=16, batch_size=8, out=complete)
    assert run_evaluation(request) == 0
    assert "| countdown | 12 × 4 |" in capsys.readouterr().out
    shutil.copytree(complete, killed)
    for name in ("results.json", "table.md", "pass_at_k.png"):
        (killed / name).unlink()
    file = killed / "generations/countdown.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:5]) + b'{"problem": 2, "samp')
    before = file.read_bytes().splitlines()[:5]
    assert run_evaluation(replace(request, out=killed), compare=complete) == 0
    output = capsys.readouterr().out
    assert "43 of 48 responses are to be generated" in output
    assert "+0.0 [+0.0, +0.0]" in output
    assert file.read_bytes().splitlines()[:5] == before
    assert responses(killed) == responses(complete)
    assert (killed / "results.json").read_bytes() == (complete / "results.json").read_bytes()
    assert {"table.md", "pass_at_k.png"} <= {path.name for path in killed.iterdir()}

    # graded again without the model; responses of other settings are refused
    (killed / "results.json").unlink()
    assert run_evaluation(EvaluationRequest("gone", [], out=killed), regrade=True) == 0
    assert (killed / "results.json").read_bytes() == (complete / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"holds an evaluation with seed=1234, here it is 7: choose another --out"):
        run_evaluation(replace(request, out=killed, seed=7))
    with pytest.raises(UserError, match=r"--max-response-tokens 128: the model has 128 positions"):
        run_evaluation(replace(request, max_response_tokens=128))


def test_an_evaluation_uses_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three replicas, on CPUs here, share the batches: the responses are those of one, bit for bit."""
    request = EvaluationRequest(
        STUDENT, ["countdown"], 2, problems=5, max_response_tokens=12, batch_size=3, out=tmp_path / "one"
    )
    assert run_evaluation(request) == 0
    monkeypatch.setattr("eaopd_megatron.launch.local_ranks._devices", lambda: 3)
    started: list[int] = []
    launch = local_ranks.launch_ranks

    def counted(work: Any, size: int) -> int:
        started.append(size)
        return launch(work, size)

    monkeypatch.setattr(local_ranks, "launch_ranks", counted)
    assert run_evaluation(replace(request, out=tmp_path / "three")) == 0
    assert started == [3]
    assert responses(tmp_path / "three") == responses(tmp_path / "one")
    with pytest.raises(UserError, match="--tensor-parallel 4: more than the 3 GPUs of this host"):
        run_evaluation(replace(request, tensor_parallel=4, out=tmp_path / "four"))


def test_a_changed_problem_is_refused_and_a_corrected_gold_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record with a line separator that is no line feed counts once."""
    generated: list[int] = []

    def answer(folder: EvaluationFolder, model: Path, missing: dict[str, list[SampleIndex]], *_: int) -> int:
        generated.append(len(missing["own"]))
        folder.response_file("own").append(DecodedResponse(*index, "\\boxed{2}", 1, "stop") for index in missing["own"])
        return 0

    monkeypatch.setattr("eaopd_megatron.evaluation.generate.generate_on_ranks", answer)
    file = tmp_path / "own.jsonl"
    request = EvaluationRequest(STUDENT, [str(file)], 1, max_response_tokens=4, suffix="", out=tmp_path / "out")
    for problem, gold in (("1 + 1", "2"), ("1 + 1", "1")):  # a gold may be corrected
        rows = [{"problem": problem, "answer": gold}, {"problem": "1\u2028+ 2", "answer": "3"}]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run_evaluation(request) == 0
    assert generated == [2]
    file.write_text(file.read_text().replace("1 + 1", "1 + 2"))
    with pytest.raises(UserError, match="holds an evaluation with prompts="):
        run_evaluation(request)


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / name / "test.jsonl" for name in "ab"]
    with pytest.raises(UserError, match=rf"{files[0]} and {files[1]} are both reported as test: rename one") as caught:
        run_evaluation(EvaluationRequest(STUDENT, [str(file) for file in files], out=tmp_path / "out"))
    assert "\n" not in str(caught.value)


@pytest.mark.server
def test_servers_generate_every_response_once(eaopd: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers are doubles that hold the student."""
    monkeypatch.setenv(SGLANG_VENV_VARIABLE, str(stand_in(tmp_path / "doubles")))
    out = tmp_path / "out"
    output = done(eaopd("evaluate", STUDENT, *SMALL, "--engine", "sglang", "--servers", "2", "--out", str(out)))
    assert "countdown: 48 of 48 responses" in output
    places = [(row["problem"], row["sample"]) for row in map(json.loads, responses(out))]
    assert sorted(places) == [(problem, sample) for problem in range(12) for sample in range(4)]
