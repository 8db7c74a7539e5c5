"""Named benchmarks: where their problems come from, which grader they have, and whether their golds can be graded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eaopd_megatron.data.sources import SOURCE_KINDS, FieldNames, Problem, load_problems, lone_surrogate
from eaopd_megatron.errors import RecipeError, UserError
from eaopd_megatron.evaluation.answers import last_boxed
from eaopd_megatron.evaluation.grading import MathGrader, grade_countdown, shared_math_grader
from eaopd_megatron.evaluation.results import Grader

if TYPE_CHECKING:
    from eaopd_megatron.data.prompts import PromptBuilder
    from eaopd_megatron.data.types import Prompt


@dataclass(frozen=True)
class HubBenchmark:
    """The `test` split of a Hugging Face dataset at one commit. solution: the gold is the last box of a solution."""

    name: str
    revision: str
    fields: FieldNames
    solution: bool = False


BENCHMARKS: dict[str, HubBenchmark] = {
    "math500": HubBenchmark(
        "HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", FieldNames(id="unique_id")
    ),
    "aime24": HubBenchmark(
        "math-ai/aime24", "83a7f387baaa524a8bda0022eac0541582297103", FieldNames(answer="solution"), solution=True
    ),
    "aime25": HubBenchmark("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", FieldNames()),
    "amc23": HubBenchmark("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057", FieldNames(problem="question")),
    "minerva_math": HubBenchmark(
        "math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96", FieldNames(problem="question")
    ),
    "olympiadbench": HubBenchmark(
        "math-ai/olympiadbench",
        "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84",
        FieldNames(problem="question", answer="final_answer"),
    ),
}


def benchmark_name(source: str) -> str:
    """Return the name under which a source is reported: its own, or a path's file name without the suffix."""
    path = Path(source)
    return path.stem if path.suffix in (".jsonl", ".parquet") else source.strip("/").split("/")[-1]


def sources_by_name(sources: Sequence[str]) -> dict[str, str]:
    """Return {benchmark name: source}. Raise UserError if two sources have the same name."""
    names: dict[str, str] = {}
    for source in sources:
        other = names.setdefault(benchmark_name(source), source)
        if other != source:
            raise UserError(f"{other} and {source} are both reported as {benchmark_name(source)}: rename one")
    return names


def is_countdown(source: str, problems: Sequence[Problem]) -> bool:
    """Return whether a benchmark is graded by Countdown's exact checker.

    Its problems' own fields decide, not its name: Countdown's have numbers and a target, and no gold.
    """
    if source in BENCHMARKS:
        return False
    return bool(problems) and all(
        "numbers" in problem and "target" in problem and problem.get("answer") is None for problem in problems
    )


def grader_for(source: str, problems: Sequence[Problem]) -> Grader:
    """Return the exact checker for Countdown's problems, mathematical equality of answers for any others.

    Raise UserError if math-verify is needed and missing.
    """
    return grade_countdown if is_countdown(source, problems) else shared_math_grader()


def load_benchmark(source: str, names: FieldNames | None = None) -> list[Problem]:
    """Load a named benchmark, `countdown` (its held-out problems), a file or a Hugging Face dataset.

    names: field names of a file or dataset that is no named benchmark. Raise UserError for an unknown name, and for a
    record without a problem or a gold.
    """
    known = BENCHMARKS.get(source)
    if source == "countdown":
        return load_problems(source, "heldout")
    names_gold = names is not None and names.answer != FieldNames().answer
    if known is not None:
        problems = load_problems(f"hub:{known.name}@{known.revision}", "test", known.fields)
    elif source.startswith("hub:") or source.endswith((".jsonl", ".parquet")):
        problems = load_problems(source, "test", names)
    else:
        available, other = ", ".join(["countdown", *BENCHMARKS]), SOURCE_KINDS.partition(", ")[2]
        raise RecipeError(f"there is no benchmark {source!r}; those that exist are {available}; or {other}")
    _require_text(problems, source)
    if not names_gold and is_countdown(source, problems):
        return problems
    return [
        {**problem, "answer": _gold(problem, f"{source}, record {number}", known is not None and known.solution)}
        for number, problem in enumerate(problems, 1)
    ]


def load_prompts(
    source: str,
    builder: PromptBuilder,
    *,
    first: int | None = None,
    problems: Sequence[Problem] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Prompt]:
    """Load a benchmark, or its `first` problems, and build their prompts.

    problems: what `load_benchmark` returned, if it was called before. report: receives the warnings of `check_golds`
    and the number of problems too long for the builder's limit; None skips both, as on ranks but the main one.
    """
    problems = (load_benchmark(source) if problems is None else problems)[:first]
    if report is not None:
        check_golds(source, problems, report)
    prompts, dropped = builder.build(problems, source)
    if dropped and report is not None:
        report(f"{source}: left out {dropped} problems longer than {builder.max_tokens} tokens")
    return prompts


def check_golds(source: str, problems: Sequence[Problem], report: Callable[[str], None]) -> None:
    """Parse every gold as the grader will.

    Raise UserError for a gold that math-verify cannot parse; report those that it parses as text, which only the same
    text equals.
    """
    grader = grader_for(source, problems)
    if not isinstance(grader, MathGrader):
        return
    kinds = grader.gold_kinds([problem["answer"] for problem in problems])
    for number, (problem, kind) in enumerate(zip(problems, kinds, strict=True), 1):
        if kind == "nothing":
            raise UserError(
                f"{source}, record {number} ({problem['id']}): the gold {problem['answer']!r} cannot be read: "
                "correct it, or leave the record out"
            )
    texts = [problem["answer"] for problem, kind in zip(problems, kinds, strict=True) if kind == "text"]
    if texts:
        report(f"{source}: math-verify does not parse {len(texts)} golds, which are compared as text: {texts}")


def _require_text(problems: Sequence[Problem], source: str) -> None:
    """Raise UserError for a record with half of a surrogate pair, which no tokenizer reads and no file holds."""
    for number, problem in enumerate(problems, 1):
        for name, value in problem.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            if half := lone_surrogate(text):
                raise UserError(
                    f"{source}, record {number} ({problem['id']}): {name!r} holds the lone surrogate {half}, which is "
                    "no character: correct the record, or leave it out"
                )


_FIELDS = "call them problem and answer or, with eaopd evaluate, see --fields"


def _gold(problem: Problem, where: str, solution: bool) -> str:
    if not isinstance(problem.get("problem"), str) or not problem["problem"].strip():
        raise UserError(f"{where}: no problem; its fields are {', '.join(problem)}; {_FIELDS}")
    gold = problem.get("answer")
    if isinstance(gold, list):
        gold = ", ".join(map(str, gold))
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)
    text = "" if gold is None else str(gold)
    text = (last_boxed(text) or "") if solution else text
    if not text.strip():
        raise UserError(f"{where} ({problem['id']}): no gold; its fields are {', '.join(problem)}; {_FIELDS}")
    return text
