"""The problems that a run trains on: its source's, less those that its evaluation must not share with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from eaopd_megatron.config import Recipe
from eaopd_megatron.data.decontamination import Decontamination, summary, write_report
from eaopd_megatron.data.sources import Fields, Problem, load_problems
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.benchmarks import load_benchmark


def training_problems(recipe: Recipe, report: Path | None, say: Callable[[str], None]) -> list[Problem]:
    """The problems of `data.source`, in its order, without those that `data.decontaminate` finds.

    report: the file for what was left out; None: another rank writes it. Raises UserError where nothing is left.
    """
    chosen = recipe.data
    problems = load_problems(chosen.source, chosen.split, Fields(problem=chosen.prompt_field))
    if not chosen.decontaminate:
        return problems
    benchmarks = {name: load_benchmark(name) for name in chosen.decontaminate}
    kept, matches = Decontamination(benchmarks, chosen.decontaminate_ngram).clean(problems)
    say(f"{len(matches)} of {len(problems)} training problems are evaluation problems too: {summary(matches)}")
    if report is not None:
        write_report(report, matches, problems=len(problems), ngram=chosen.decontaminate_ngram)
    if not kept:
        raise UserError(f"data.decontaminate leaves nothing of {chosen.source}: name other benchmarks")
    return kept
