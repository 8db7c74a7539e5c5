"""An evaluation's folder: what was asked of which model, the responses, and what they come to.

settings.json            what every response depends on
prompts/NAME.jsonl       a benchmark's prompts and golds
generations/NAME.jsonl   its responses, as they were finished
results.json  table.md  pass_at_k.png
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.data.types import Prompt
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import tables
from eaopd_megatron.evaluation.grading import grade_responses, grader_for
from eaopd_megatron.evaluation.results import BenchmarkResult, EvaluationResult, ProblemResult, summarise
from eaopd_megatron.utils.files import atomic_write

SampleIndex = tuple[int, int]
"""Number of the problem, number of the sample."""


@dataclass(frozen=True)
class StoredResponse:
    """One response. tokens: its length; finish_reason: "stop" | "length"."""

    problem: int
    sample: int
    text: str
    tokens: int
    finish_reason: str

    @property
    def place(self) -> SampleIndex:
        return self.problem, self.sample


class ResponseFile:
    """The file of a benchmark's responses. What was being written when a process was killed is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[SampleIndex, StoredResponse]:
        """The responses by their place. UserError for a file that is damaged elsewhere than at its end."""
        found: dict[SampleIndex, StoredResponse] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                one = StoredResponse(**json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{self.path}, line {number}: no response: remove the line and run again") from None
            found.setdefault(one.place, one)
        return found

    def missing(self, problems: int, samples: int) -> list[SampleIndex]:
        """The places without a response, in order."""
        found = self.read()
        places = [(problem, sample) for problem in range(problems) for sample in range(samples)]
        return [place for place in places if place not in found]

    def append(self, finished: Iterable[StoredResponse]) -> None:
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
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def read_prompts(path: Path) -> list[Prompt]:
    """What `write_prompts` wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Prompt(row["id"], tuple(row["token_ids"]), row["problem"]) for row in rows]


_SAMPLED_BYTES = 2**20


@dataclass(frozen=True)
class EvaluationFolder:
    """See the module."""

    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.json"

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    def prompts(self, name: str) -> Path:
        """The file of a benchmark's prompts."""
        return self.path / "prompts" / f"{name}.jsonl"

    def response_file(self, name: str) -> ResponseFile:
        """A benchmark's responses."""
        return ResponseFile(self.path / "generations" / f"{name}.jsonl")

    def settings(self) -> dict[str, Any]:
        """What `begin` wrote. UserError where there is no evaluation."""
        try:
            return dict(json.loads(self.settings_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no evaluation: {self.settings_file.name} is missing") from None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Starts or goes on. UserError, with the first difference, where responses to something else lie here."""
        wanted = json.loads(json.dumps(settings))
        if self.settings_file.exists():
            there = self.settings()
            for key in wanted:
                if there.get(key) != wanted[key]:
                    raise UserError(
                        f"{self.path} holds an evaluation with {key}={there.get(key)}, here it is {wanted[key]}: "
                        "choose another --out, or remove that one"
                    )
        atomic_write(self.settings_file, json.dumps(wanted, indent=1) + "\n")

    def grade(self) -> EvaluationResult:
        """Grades every stored response. UserError where some are missing."""
        settings = self.settings()
        graded = {
            name: self._graded(name, source, settings["samples"]) for name, source in settings["benchmarks"].items()
        }
        return EvaluationResult(0, graded)

    def _graded(self, name: str, source: str, samples: int) -> BenchmarkResult:
        prompts, found = read_prompts(self.prompts(name)), self.response_file(name).read()
        places = [(problem, sample) for problem in range(len(prompts)) for sample in range(samples)]
        if missing := [place for place in places if place not in found]:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(places)} responses to {name} are missing: run the same command "
                "without --regrade"
            )
        responses = [found[place] for place in places]
        grades = grade_responses(grader_for(source), [(prompts[one.problem].problem, one.text) for one in responses])
        rows = []
        for number, prompt in enumerate(prompts):
            part = slice(number * samples, (number + 1) * samples)
            truncated = [one.finish_reason == "length" for one in responses[part]]
            lengths = [one.tokens for one in responses[part]]
            rows.append(ProblemResult.from_grades(prompt.id, grades[part], truncated, lengths))
        return summarise(name, samples, rows)

    def write(self, result: EvaluationResult) -> None:
        """The results as JSON, as a Markdown table and as a picture."""
        from eaopd_megatron.plotting.curves import draw_pass_curves
        from eaopd_megatron.reporting.plots import to_png

        content = {"settings": self.settings(), "figures": tables.figures_json(result), **result.to_json()}
        atomic_write(self.results_file, json.dumps(content) + "\n")
        atomic_write(self.path / "table.md", tables.results_markdown(result))
        atomic_write(self.path / "pass_at_k.png", to_png(draw_pass_curves({"": result})))


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Of what responses answer. Golds are not in it: they may be corrected and the responses graded again."""
    content = json.dumps([(prompt.id, prompt.token_ids) for prompt in prompts])
    return hashlib.sha256(content.encode()).hexdigest()


def weights_fingerprint(model: Path) -> str:
    """A digest of a model's folder: of config.json, and of each weights file its size and three parts of a MiB."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - _SAMPLED_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]
