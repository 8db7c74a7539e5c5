"""The report and verdict of `eaopd doctor RECIPE`."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from eaopd_megatron.diagnostics.eos_check import EosCheckResult

TEXTS = ["<a>", "<b>", "<c>"]
NAN = math.nan


def report(**changes: Any) -> tuple[bool, list[str]]:
    pair = {
        "name": "",
        "model": "m",
        "terminal_map": "swap",
        "student_id": 0,
        "teacher_id": 1,
        "prompts": 4,
        "limit": 16,
    }
    result = EosCheckResult(**{**pair, "ends": [(0, -0.5, NAN), (0, -1.5, NAN)], **changes})
    return result.disagrees, list(result.lines(TEXTS))


def test_a_pair_that_agrees_is_described() -> None:
    assert report() == (
        False,
        [
            "teacher m",
            "  2 of 4 responses (50%) stopped within 16 tokens",
            "  ended with 0 '<a>': 2",
            "  the teacher's log-prob of the end (terminal_map swap): mean -1.00, lowest -1.50",
            "  without a map: not known from its top-k",
            "  the pair agrees on how to stop",
        ],
    )


@pytest.mark.parametrize(
    ("changes", "disagrees", "last"),
    [
        ({"ends": [(0, -21.0, -21.0)], "terminal_map": "none"}, True, "set teacher.terminal_map=swap: .* with 1 '<b>'"),
        ({"ends": [(1, -21.0, -0.1)]}, True, "set teacher.terminal_map=none: the student ends as the teacher does"),
        ({"ends": [(1, -21.0, -0.1), (0, -21.0, NAN)]}, True, "look at eos_token_id in both"),
        ({"ends": [(2, -11.0, -12.0)]}, True, "look at eos_token_id in both"),
        ({"ends": [(0, -11.0, -11.0)], "terminal_map": "none", "teacher_id": 0}, True, "look at eos_token_id in both"),
        ({"ends": [(0, -9.9, -9.9)], "terminal_map": "none"}, False, "the pair agrees on how to stop"),
        ({"ends": []}, False, "cannot be judged: raise rollout.max_response_tokens"),
        (
            {"ends": [(0, -21.0, -21.0)], "terminal_map": "none", "name": "math"},
            True,
            "set teachers.math.terminal_map=swap",
        ),
    ],
)
def test_the_verdict_has_another_remedy(changes: dict[str, Any], disagrees: bool, last: str) -> None:
    found, lines = report(**changes)
    assert found is disagrees
    assert re.search(last, lines[-1]), lines[-1]


def test_log_probs_that_are_known_of_some_count_as_known_of_all() -> None:
    _, lines = report(ends=[(0, -0.5, -20.0), (2, -0.7, NAN)])
    assert "  ended with 2 '<c>': 1" in lines
    assert "  without a map: mean -20.00, lowest -20.00 (known of 1)" in lines
    _, lines = report(terminal_map="none", teacher_id=0)
    assert "terminal_map none: both end with the same id" in lines[3] and "without a map" not in "".join(lines)
