"""The folder of one `eaopd evaluate`: its settings, prompts, responses and results.

settings.json            everything that the responses depend on
prompts/NAME.jsonl       a benchmark's prompts and golds
generations/NAME.jsonl   its responses, in the order in which they finished
results.json  table.md  pass_at_k.png
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eaopd_megatron.data.sources import lone_surrogate
from eaopd_megatron.data.types import Prompt
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.benchmarks import grader_for
from eaopd_megatron.evaluation.grading import DecodedResponse, grade_problems, problem_digest
from eaopd_megatron.evaluation.results import (
    BenchmarkResult,
    EvaluationResult,
    figures_json,
    results_markdown,
    summarise,
)
from eaopd_megatron.utils.files import atomic_write, read_json

SampleIndex = tuple[int, int]
"""(problem, sample)."""
_FINGERPRINT_BYTES = 2**20


class ResponseFile:
    """A benchmark's responses, a JSON line each. A line that a killed process left incomplete does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[SampleIndex, DecodedResponse]:
        """Return the responses by index. Raise UserError for a file that is damaged elsewhere than at its end."""
        responses: dict[SampleIndex, DecodedResponse] = {}
        data = self.path.read_bytes() if self.path.exists() else b""
        for number, line in enumerate(data.decode("utf-8", errors="replace").split("\n")[:-1], 1):
            try:
                response = DecodedResponse(**json.loads(line))
                response.check()
            except (ValueError, TypeError):
                raise UserError(f"{self.path}, line {number}: no response: remove the line and run again") from None
            responses.setdefault((response.problem, response.sample), response)
        return responses

    def missing(self, problems: int, samples: int) -> list[SampleIndex]:
        """Return the indices without a response, in order."""
        responses = self.read()
        return [index for index in _indices(problems, samples) if index not in responses]

    def append(self, finished: Iterable[DecodedResponse]) -> None:
        """Append responses and bring them to the disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = "".join(_json_line(asdict(one)) for one in finished).encode()
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def remove_incomplete_line(self) -> None:
        """Cut off a last line without its end, before anything is appended."""
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write a benchmark's prompts, so that responses can be generated and graded without its source."""
    rows = [{"id": p.id, "token_ids": p.token_ids, "problem": p.problem} for p in prompts]
    atomic_write(path, "".join(map(_json_line, rows)))


def _json_line(row: Mapping[str, Any]) -> str:
    """Return a line of UTF-8, with escapes alone if the row has half of a surrogate pair, which UTF-8 has not."""
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    return line if line.isascii() or not lone_surrogate(line) else json.dumps(row, default=str) + "\n"


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of `write_prompts`. Raise UserError if it is missing or damaged."""
    prompts: list[Prompt] = []
    try:
        for line in path.read_text(encoding="utf-8").removesuffix("\n").split("\n"):
            row = json.loads(line)
            prompts.append(Prompt(str(row["id"]), tuple(map(int, row["token_ids"])), dict(row["problem"])))
    except OSError as error:
        raise UserError(f"{path}: the evaluation's prompts are missing ({error.strerror})") from None
    except (ValueError, TypeError, KeyError):
        where = f"{path}, line {len(prompts) + 1}"
        raise UserError(f"{where}: no prompt: the file is damaged; evaluate into another --out") from None
    return prompts


@dataclass(frozen=True)
class EvaluationFolder:
    """Paths and contents of an evaluation's folder; see the module's docstring."""

    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / "settings.json"

    @property
    def results_file(self) -> Path:
        return self.path / "results.json"

    def prompts(self, name: str) -> Path:
        return self.path / "prompts" / f"{name}.jsonl"

    def response_file(self, name: str) -> ResponseFile:
        return ResponseFile(self.path / "generations" / f"{name}.jsonl")

    def settings(self) -> dict[str, Any]:
        """Return what `begin` wrote. Raise UserError if there is no evaluation."""
        if not self.settings_file.exists():
            raise UserError(f"{self.path} holds no evaluation: {self.settings_file.name} is missing")
        settings = read_json(self.settings_file, str(self.path))
        for name, kind in (("benchmarks", dict), ("samples", int), ("sampling", dict)):
            if not isinstance(settings.get(name), kind):
                raise UserError(
                    f"{self.settings_file} is damaged: {name} is {settings.get(name)!r}: restore the file, or evaluate "
                    "into another --out"
                )
        return settings

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; raise UserError if another process does. Its death frees the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{self.path}: another eaopd evaluate is writing there: wait for it, or choose another --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    def read_result(self) -> EvaluationResult:
        """Return what `write` wrote, with each problem's digest. Raise UserError if there is none or it is damaged."""
        if not self.results_file.exists():
            raise UserError(f"{self.path} holds no results: {self.results_file.name} is missing; evaluate there first")
        result = EvaluationResult.read(self.results_file)
        return EvaluationResult(
            result.iteration, {name: self._with_digests(one) for name, one in result.benchmarks.items()}
        )

    def _with_digests(self, benchmark: BenchmarkResult) -> BenchmarkResult:
        """Earlier releases wrote no digests; the prompts have them."""
        if all(one.digest for one in benchmark.results) or not self.prompts(benchmark.name).exists():
            return benchmark
        digests = self.digests(benchmark.name)
        if len(digests) != benchmark.problems:
            raise UserError(f"{self.path}: {benchmark.name} has other prompts than results: run --regrade there first")
        rows = [replace(one, digest=digest) for one, digest in zip(benchmark.results, digests, strict=True)]
        return summarise(benchmark.name, benchmark.samples, rows)

    def digests(self, name: str) -> list[str]:
        """Return the digest of each problem of a benchmark."""
        return [problem_digest(prompt.problem) for prompt in read_prompts(self.prompts(name))]

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Start or resume an evaluation. Raise UserError, naming the first difference, if it has other settings."""
        new = json.loads(json.dumps(settings))
        if self.settings_file.exists():
            old = self.settings()
            for key in new:
                if old.get(key) != new[key]:
                    raise UserError(
                        f"{self.path} holds an evaluation with {key}={old.get(key)}, here it is {new[key]}: "
                        "choose another --out, or remove that one"
                    )
        atomic_write(self.settings_file, json.dumps(new, indent=1) + "\n")

    def grade(self) -> EvaluationResult:
        """Grade every stored response. Raise UserError if some are missing."""
        settings = self.settings()
        sources, samples = settings["benchmarks"].items(), settings["samples"]
        return EvaluationResult(0, {name: self._grade(name, source, samples) for name, source in sources})

    def _grade(self, name: str, source: str, samples: int) -> BenchmarkResult:
        prompts, responses = read_prompts(self.prompts(name)), self.response_file(name).read()
        indices = _indices(len(prompts), samples)
        missing = sum(index not in responses for index in indices)
        if missing:
            raise UserError(
                f"{self.path}: {missing} of {len(indices)} responses to {name} are missing: run the same command "
                "without --regrade"
            )
        graded = grade_problems(
            grader_for(source, [one.problem for one in prompts]), prompts, [responses[index] for index in indices]
        )
        return summarise(name, samples, list(graded.values()))

    def write(self, result: EvaluationResult) -> None:
        """Write the results as JSON, as a Markdown table and as a figure of pass@k."""
        from eaopd_megatron.plotting.curves import draw_pass_curves, to_png

        content = {"settings": self.settings(), "figures": figures_json(result), **result.to_json()}
        atomic_write(self.results_file, json.dumps(content) + "\n")
        atomic_write(self.path / "table.md", results_markdown(result))
        curves = {name: {"": benchmark.pass_curve()} for name, benchmark in result.benchmarks.items()}
        atomic_write(self.path / "pass_at_k.png", to_png(draw_pass_curves(curves)))


def _indices(problems: int, samples: int) -> list[SampleIndex]:
    return [(problem, sample) for problem in range(problems) for sample in range(samples)]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of the prompts' ids and tokens. Golds are left out: they may be corrected and graded again."""
    content = json.dumps([(prompt.id, prompt.token_ids) for prompt in prompts])
    return hashlib.sha256(content.encode()).hexdigest()


def weights_fingerprint(model: Path) -> str:
    """Return a digest of a model's folder: config.json, and of each weights file its size and three parts of 1 MiB."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for start in (0, max(0, size // 2), max(0, size - _FINGERPRINT_BYTES)):
                stream.seek(start)
                digest.update(stream.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
