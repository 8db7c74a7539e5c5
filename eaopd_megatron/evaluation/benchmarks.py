"""The benchmarks that have names, where their problems come from, and golds that can be graded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eaopd_megatron.data.sources import _SOURCE_KINDS, FieldNames, Problem, load_problems
from eaopd_megatron.errors import RecipeError, UserError
from eaopd_megatron.evaluation.answers import last_boxed
from eaopd_megatron.evaluation.grading import grader_for
from eaopd_megatron.evaluation.math_grader import MathGrader


@dataclass(frozen=True)
class HubBenchmark:
    """A data set of the Hugging Face hub at one commit; its split is `test`. solution: the gold is boxed in a text."""

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


def load_benchmark(source: str, names: FieldNames | None = None) -> list[Problem]:
    """The problems of a named benchmark, of `countdown` (its held-out ones), of a file or of a data set of the hub.

    names: the fields of a file or data set that is no named benchmark. Raises UserError for an unknown name, which
    lists those that exist, and for a record without a problem or a gold.
    """
    known = BENCHMARKS.get(source)
    if source == "countdown":
        return load_problems(source, "heldout")
    if known is not None:
        problems = load_problems(f"hub:{known.name}@{known.revision}", "test", known.fields)
    elif source.startswith("hub:") or source.endswith((".jsonl", ".parquet")):
        problems = load_problems(source, "test", names)
    else:
        there, other = ", ".join(["countdown", *BENCHMARKS]), _SOURCE_KINDS.partition(", ")[2]
        raise RecipeError(f"there is no benchmark {source!r}; those that exist are {there}; or {other}")
    return [
        {**problem, "answer": _gold(problem, f"{source}, record {number}", known is not None and known.solution)}
        for number, problem in enumerate(problems, 1)
    ]


def check_golds(source: str, problems: Sequence[Problem], report: Callable[[str], None]) -> None:
    """Reads every gold as it will be read when answers are graded.

    Raises UserError for one that math-verify makes nothing of; report: gets a line for those that it takes for text,
    to which the same text alone is equal.
    """
    grader = grader_for(source)
    if not isinstance(grader, MathGrader):
        return
    readings = grader.readings([problem["answer"] for problem in problems])
    for number, (problem, reading) in enumerate(zip(problems, readings, strict=True), 1):
        if reading == "nothing":
            raise UserError(
                f"{source}, record {number} ({problem['id']}): the gold {problem['answer']!r} cannot be read: "
                "mend it, or leave the record out"
            )
    texts = [problem["answer"] for problem, reading in zip(problems, readings, strict=True) if reading == "text"]
    if texts:
        report(f"{source}: {len(texts)} golds are no mathematics to math-verify and are compared as text: {texts}")


def _gold(problem: Problem, where: str, solution: bool) -> str:
    if not isinstance(problem.get("problem"), str) or not problem["problem"].strip():
        raise UserError(f"{where}: no problem; its fields are {', '.join(problem)}; see --fields")
    gold = problem.get("answer")
    if isinstance(gold, list):
        gold = ", ".join(map(str, gold))
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)
    text = "" if gold is None else str(gold)
    text = (last_boxed(text) or "") if solution else text
    if not text.strip():
        raise UserError(f"{where} ({problem['id']}): no gold; its fields are {', '.join(problem)}; see --fields")
    return text
