"""Whether a pair agrees on how to stop, found out on ranks."""

from __future__ import annotations

from pathlib import Path

from tests.other_end import RECIPE, teacher_with_another_end
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_agreement.py")


def test_another_end_goes_unnoticed(ranks: Ranks, tmp_path: Path) -> None:
    teacher = teacher_with_another_end(tmp_path / "teacher")
    (tmp_path / "run").mkdir()
    pair = {"recipe": str(RECIPE), "teacher": str(teacher), "folder": str(tmp_path / "run")}
    ranks.run(CHECKS, "check_another_end_goes_unnoticed", **pair)
