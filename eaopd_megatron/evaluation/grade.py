"""The grade of one response."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Problem = dict[str, Any]


@dataclass(frozen=True)
class Grade:
    """One response's grade. `key` names the answer that it gives, equal for equal answers; None where it gives none.

    `error`: the grader threw or ran out of time, and the response counts as wrong. `lenient`: right in a notation that
    the strict comparison does not read, too; always where `correct`.
    """

    correct: bool
    key: str | None
    error: bool = False
    lenient: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lenient", self.lenient or self.correct)


Grader = Callable[[Problem, str], Grade]
