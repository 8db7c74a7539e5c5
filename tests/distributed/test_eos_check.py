"""The check of a pair's end tokens (`eaopd doctor RECIPE`) on four gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from eaopd_megatron.data import countdown
from tests.other_end import RECIPE, teacher_with_another_end
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_eos_check.py")


def test_another_end_goes_unnoticed(ranks: Ranks, tmp_path: Path) -> None:
    teacher = teacher_with_another_end(tmp_path / "teacher")
    (tmp_path / "run").mkdir()
    pair = {"recipe": str(RECIPE), "teacher": str(teacher), "folder": str(tmp_path / "run")}
    ranks.run(CHECKS, "check_another_end_goes_unnoticed", **pair)


def test_teachers_are_tried_on_no_prompts(ranks: Ranks, tmp_path: Path) -> None:
    named = [problem | {"teacher": ("math", "code")[i % 2]} for i, problem in enumerate(countdown.problems("train"))]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in named))
    recipe = {"base": str(RECIPE), "data": {"source": str(tmp_path / "problems.jsonl"), "teacher_field": "teacher"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run").mkdir()
    several = {"recipe": str(tmp_path / "recipe.yaml"), "folder": str(tmp_path / "run")}
    ranks.run(CHECKS, "check_a_teacher_of_several_has_no_prompt", **several)
