"""Two colocated teachers, one of another vocabulary size, each for the prompts that name it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from eaopd_megatron.data import countdown
from tests.end_to_end.runs import ROOT, Command
from tools.lib.run_records import records

Start = Callable[..., Command]
COUNTDOWN = ROOT / "recipes/countdown"
SIZE = 130  # the other model has 112; the tokenizer's ids are below both


def wider(folder: Path) -> Path:
    """Countdown's teacher with rows for ids that the tokenizer does not give, as probable as others."""
    shutil.copytree(COUNTDOWN / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": SIZE}))
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if tensor.shape[0] == config["vocab_size"]:
            weights[name] = torch.cat([tensor, tensor[: SIZE - len(tensor)]])
    save_file(weights, folder / "model.safetensors")
    return folder


def test_each_prompt_is_scored_by_the_teacher_that_it_names(eaopd: Start, tmp_path: Path) -> None:
    """What is recorded of each adds up to what is recorded of all, and the report shows both."""
    problems = countdown.problems("train")[:24]
    named = [problem | {"for": ("one", "wide")[i % 3 == 0]} for i, problem in enumerate(problems)]
    data, run = tmp_path / "problems.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(problem) + "\n" for problem in named))
    recipe = {
        "base": str(COUNTDOWN / "eopd.yaml"),
        "run": {"folder": str(run), "log_rollouts": 12},
        "data": {"source": str(data), "teacher_field": "for"},
        "teachers": {
            "one": {"offload": "weights"},
            "wide": {"model": str(wider(tmp_path / "wide")), "signal": "hidden"},
        },
        "train": {"iterations": 2, "prompts_per_iteration": 12, "mini_batch": 6},
        "evaluation": {"benchmarks": []},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, _, err = eaopd("train", str(tmp_path / "recipe.yaml")).wait()
    assert code == 0, err

    models = {"one": str(COUNTDOWN / "teacher"), "wide": str(tmp_path / "wide")}
    of = {str(problem.get("id", i)): models[str(problem["for"])] for i, problem in enumerate(named)}
    rollouts = [json.loads(line) for path in (run / "rollouts").iterdir() for line in path.read_text().splitlines()]
    assert len(rollouts) == 24
    assert all(sample["teacher"] == of[sample["prompt_id"]] for sample in rollouts)
    for record in records(run)[1:]:
        tokens = [record[f"teachers/{name}/tokens"] for name in models]
        assert min(tokens) > 0
        for figure, of_both in (("entropy", "teacher/entropy"), ("loss", "objective/loss")):
            shares = [record[f"teachers/{name}/{figure}"] * count for name, count in zip(models, tokens, strict=True)]
            assert abs(sum(shares) / sum(tokens) - record[of_both]) < 1e-6
    report = (run / "report.html").read_text()
    assert "<h2>Teachers</h2>" in report and "<td>wide</td>" in report
