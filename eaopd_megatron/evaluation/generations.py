"""Responses of a model to a benchmark, kept as they are finished: one JSON line each, in any order."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eaopd_megatron.data.samples import Prompt
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.results import write_atomically

Place = tuple[int, int]
"""Number of the problem, number of the sample."""


@dataclass(frozen=True)
class Generation:
    """One response. tokens: its length; finish_reason: "stop" | "length"."""

    problem: int
    sample: int
    text: str
    tokens: int
    finish_reason: str

    @property
    def place(self) -> Place:
        return self.problem, self.sample


class Generations:
    """The file of a benchmark's responses. What was being written when a process was killed is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Place, Generation]:
        """The responses by their place. UserError for a file that is damaged elsewhere than at its end."""
        found: dict[Place, Generation] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                one = Generation(**json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{self.path}, line {number}: no response: remove the line and run again") from None
            found.setdefault(one.place, one)
        return found

    def missing(self, problems: int, samples: int) -> list[Place]:
        """The places without a response, in order."""
        found = self.read()
        places = [(problem, sample) for problem in range(problems) for sample in range(samples)]
        return [place for place in places if place not in found]

    def append(self, finished: Iterable[Generation]) -> None:
        """Adds responses, which are on the disk afterwards."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in finished).encode()
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def mend(self) -> None:
        """Cuts off a last line that was not written to its end; before anything is appended."""
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def _lines(self) -> list[str]:
        """The whole lines."""
        if not self.path.exists():
            return []
        return self.path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """A benchmark's prompts, so that its responses can be generated and graded without the data set."""
    rows = [{"id": p.id, "token_ids": p.token_ids, "problem": p.problem} for p in prompts]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def read_prompts(path: Path) -> list[Prompt]:
    """What `write_prompts` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Prompt(row["id"], tuple(row["token_ids"]), row["problem"]) for row in rows]
