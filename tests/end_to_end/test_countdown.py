"""The main job, start to end, and what happens to it at night."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.end_to_end.runs import ROOT, SMALL, Command, alive, wait_for, workers_of
from tools.lib.run_records import records

Start = Callable[..., Command]
RECIPE = "recipes/countdown/eopd.yaml"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished short run."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, out, err = Command("train", RECIPE, f"run.folder={run}", *SMALL).wait()
    assert code == 0, err
    assert "finished:" in out
    return run


def test_a_run_leaves_everything_that_the_design_names(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "rollouts",
        "evaluation",
        "student",
        "report.html",
        "report",
        "tensorboard",
    } <= names
    found = records(uninterrupted)
    assert [r["iteration"] for r in found] == list(range(7))
    assert [r["update"] for r in found] == [3 * i for i in range(7)]
    last = found[-1]
    for name in [
        "objective/loss",
        "objective/reverse_kl",
        "objective/forward_kl_gated",
        "objective/forward_kl_ungated",
        "objective/gate_fraction",
        "objective/gate_ambiguous",
        "objective/clip_fraction",
        "objective/kl_min",
        "teacher/entropy",
        "teacher/topk_mass",
        "teacher/entropy_gated",
        "teacher/entropy_ungated",
        "student/entropy",
        "student/entropy_gated",
        "student/entropy_ungated",
        "rollout/length",
        "rollout/truncated",
        "rollout/stopped",
        "rollout/version_lag",
        "rollout/logprob_gap",
        "optimizer/lr",
        "optimizer/grad_norm",
        "evaluation/countdown/pass@1",
        "evaluation/countdown/pass@2",
        "evaluation/countdown/distinct_correct",
    ]:
        assert name in last, name
    assert last["rollout/version_lag"] == 0
    assert last["rollout/logprob_gap"] < 1e-4  # the rollout's weights are the trainer's
    assert last["objective/kl_min"] > -1e-5
    assert {p.name for p in (uninterrupted / "checkpoints").iterdir()} == {"step_000004", "step_000006"}
    assert len((uninterrupted / "rollouts" / "000006.jsonl").read_text().splitlines()) == 4


def test_a_run_over_pipeline_and_context_ranks_writes_what_the_first_rank_does_not_compute(
    eaopd: Start, tmp_path: Path
) -> None:
    """The objective is on the last stage; rank 0 writes its figures, π_old and the whole student."""
    run = tmp_path / "run"
    layout = ("student.tensor_parallel=1", "student.pipeline_parallel=2", "student.context_parallel=2")
    small = ("train.iterations=2", "train.micro_batch_tokens=64", "run.save_interval=0", "evaluation.interval=0")
    code, _, err = eaopd("train", RECIPE, f"run.folder={run}", *SMALL, *small, *layout).wait()
    assert code == 0, err
    last = records(run)[-1]
    assert last["rollout/logprob_gap"] < 1e-4 and last["objective/kl_min"] > -1e-5
    assert {"objective/loss", "teacher/topk_mass", "optimizer/grad_norm", "evaluation/countdown/pass@1"} <= last.keys()
    for line in (run / "rollouts" / "000002.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(row["old_logprobs"]) == len(row["response_ids"])
        assert row["old_logprobs"] == pytest.approx(row["rollout_logprobs"], abs=1e-4)
    names = load_file(ROOT / "recipes/countdown/student/model.safetensors").keys()
    assert load_file(run / "student/model.safetensors").keys() == names


def test_the_exported_student_is_the_trained_one(uninterrupted: Path) -> None:
    """It loads with transformers, answers, and differs from the start in every matrix."""
    model = AutoModelForCausalLM.from_pretrained(uninterrupted / "student")
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted / "student")
    assert model.config.vocab_size == len(tokenizer)
    before = load_file(ROOT / "recipes/countdown/student/model.safetensors")
    after = load_file(uninterrupted / "student/model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.shape == after[name].shape
        assert not torch.equal(tensor, after[name]), name
    # the log-probs that the run recorded on its last rollouts are those of weights one iteration older, and close
    row = json.loads((uninterrupted / "rollouts" / "000006.jsonl").read_text().splitlines()[0])
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    logprobs = model(ids).logits.log_softmax(-1)[0, len(row["prompt_ids"]) - 1 : -1]
    now = logprobs.gather(-1, torch.tensor(row["response_ids"])[:, None])[:, 0]
    assert (now - torch.tensor(row["rollout_logprobs"])).abs().max() < 0.5


def test_the_same_command_in_a_finished_run_does_nothing(uninterrupted: Path, eaopd: Start) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    code, out, err = eaopd("train", RECIPE, f"run.folder={uninterrupted}", *SMALL).wait()
    assert (code, err) == (0, "")
    assert "this run is finished (6 iterations)" in out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_another_recipe_does_not_go_on_in_the_run(uninterrupted: Path, eaopd: Start) -> None:
    code, _, err = eaopd("train", RECIPE, f"run.folder={uninterrupted}", *SMALL, "seed=5").wait()
    assert code == 1
    assert err.count("\n") == 1
    assert "holds a run with seed=0, this recipe has 5" in err


def test_a_finished_run_goes_on_with_more_iterations_and_another_learning_rate(
    uninterrupted: Path, eaopd: Start, tmp_path: Path
) -> None:
    """With a line in the log and in the metrics; its student then begins another run."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(uninterrupted, run)
    changes = ["train.iterations=7", "optimizer.lr=1e-4", "evaluation.benchmarks=[]"]
    code, _, err = eaopd("train", RECIPE, *SMALL, f"run.folder={run}", *changes).wait()
    assert code == 0, err
    assert [one["iteration"] for one in records(run)] == list(range(8))
    assert records(run)[:7] == records(uninterrupted)
    assert records(run)[7]["changed/optimizer.lr"] == 1e-4 and records(run)[7]["changed/train.iterations"] == 7
    assert "it is 0.0001 from iteration 7 on" in (run / "log.txt").read_text()
    assert json.loads((run / "finished.json").read_text()) == {"iterations": 7}
    before = load_file(run / "student/model.safetensors")
    begin = [
        f"run.folder={other}",
        "train.iterations=1",
        "seed=5",
        f"--continue-from={run / 'checkpoints/step_000007'}",
    ]
    code, _, err = eaopd("train", RECIPE, *SMALL, "evaluation.benchmarks=[]", *begin).wait()
    assert code == 0, err
    start = load_file(other / "start/model.safetensors")
    assert all(torch.equal(before[name], start[name]) for name in before)
    assert [one["iteration"] for one in records(other)] == [0, 1]


def test_a_run_killed_in_the_middle_repeats_the_uninterrupted_one_bit_for_bit(
    uninterrupted: Path, eaopd: Start, tmp_path: Path
) -> None:
    """kill -9 of launcher and ranks: weights, optimiser, schedule, random numbers and cursor come from the
    checkpoint."""
    run = tmp_path / "run"
    arguments = ["train", RECIPE, f"run.folder={run}", *SMALL]
    command = eaopd(*arguments)
    wait_for(lambda: (run / "checkpoints" / "step_000002").exists(), command.process)
    ranks = workers_of(command.process.pid)
    assert len(ranks) == 2
    command.process.kill()  # the ranks die with it
    command.process.wait()
    while any(alive(pid) for pid in ranks):
        pass
    assert not (run / "finished.json").exists()
    code, _, err = eaopd(*arguments).wait()
    assert code == 0, err
    assert records(run) == records(uninterrupted)
    one, other = (load_file(r / "student/model.safetensors") for r in (run, uninterrupted))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "continuing after iteration" in (run / "log.txt").read_text()


def test_a_signal_saves_and_the_same_command_goes_on(uninterrupted: Path, eaopd: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train", RECIPE, f"run.folder={run}", *SMALL, "run.save_interval=0"]
    command = eaopd(*arguments)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run)) > 1, command.process)
    command.process.send_signal(signal.SIGTERM)
    code, _, err = command.wait()
    assert code == 143
    assert "Traceback" not in err
    assert list((run / "checkpoints").glob("step_*"))
    code, _, err = eaopd(*arguments).wait()
    assert code == 0, err
    assert records(run) == records(uninterrupted)


def test_a_rank_that_dies_ends_the_others_with_one_line(eaopd: Start, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = eaopd("train", RECIPE, f"run.folder={run}", *SMALL, "train.iterations=1000")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run)) > 1, command.process)
    ranks = workers_of(command.process.pid)
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = command.wait(60)
    assert code == 137
    assert not any(alive(pid) for pid in ranks)
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1
    assert "rank 1 was killed by SIGKILL" in lines[0]


def test_a_loss_that_is_not_a_number_stops_the_run_and_saves_the_sample(eaopd: Start, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(ROOT / "recipes/countdown/teacher", teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    code, _, err = eaopd(
        "train", RECIPE, f"run.folder={run}", *SMALL, f"teacher.model={teacher}", "teacher.signal=logits"
    ).wait()
    assert code == 1
    assert len([line for line in err.splitlines() if line]) == 1, err
    assert "update 0, rank" in err
    saved = list((run / "failures").glob("update_000000_rank_*.json"))
    assert saved
    sample = json.loads(saved[0].read_text())
    assert sample["response_ids"] and sample["prompt_ids"]
