"""A teacher on an SGLang server against the same one on the ranks, at several layouts of the student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eaopd_megatron.serving.http import EventLoopThread
from tests.ranks import Ranks
from tools.sglang_double.student import StudentDouble

CHECKS = Path(__file__).with_name("checks_served.py")
PAIR = Path(__file__).resolve().parents[2] / "recipes/countdown"


@pytest.fixture
def server() -> Iterator[str]:
    """Yield the URL of a double that serves the Countdown teacher."""
    with EventLoopThread("double") as loop:
        double = StudentDouble(PAIR / "teacher")
        loop.run(double.start())
        yield double.url
        loop.run(double.die())


def test_a_served_teacher_says_another_loss(ranks: Ranks, server: str) -> None:
    pair = {"student": str(PAIR / "student"), "teacher": str(PAIR / "teacher")}
    ranks.run(CHECKS, "check_a_served_teacher_says_another_loss", **pair, url=server)
