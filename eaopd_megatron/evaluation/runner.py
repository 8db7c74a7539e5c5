"""Samples a model on benchmarks and grades what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.evaluation.benchmarks import check_golds, load_benchmark
from eaopd_megatron.evaluation.grading import benchmark_name, grade_responses, grader_for
from eaopd_megatron.evaluation.results import BenchmarkResult, EvaluationResult, Grader, ProblemResult, summarise
from eaopd_megatron.rollout.interface import GenerationRequest, RolloutEngine


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's prompts and how its answers are graded."""

    name: str
    prompts: list[Prompt]
    grader: Grader

    @classmethod
    def load(
        cls, source: str, builder: PromptBuilder, first: int | None, report: Callable[[str], None] | None
    ) -> Benchmark:
        """What `load_benchmark` knows; `first`: only so many problems. report: of `check_golds` and of problems that
        are longer than the builder's prompts; None: another rank checks them."""
        problems = load_benchmark(source)[:first]
        if report is not None:
            check_golds(source, problems, report)
        prompts, dropped = builder.build(problems, source)
        if dropped and report is not None:
            report(f"{source}: {dropped} problems are longer than {builder.max_tokens} tokens and left out")
        return cls(benchmark_name(source), prompts, grader_for(source))


@dataclass(frozen=True)
class Evaluator:
    """Draws `samples` responses a problem. The random numbers depend on (seed, benchmark, problem, sample) alone, so
    two evaluations of a run are compared under common random numbers."""

    rollout: RolloutEngine
    parallel: ParallelState
    tokenizer: Any
    benchmarks: Sequence[Benchmark]
    samples: int
    sampling: SamplingParams
    seed: int

    def prompts(self) -> list[Prompt]:
        """Of all benchmarks."""
        return [prompt for benchmark in self.benchmarks for prompt in benchmark.prompts]

    def longest(self) -> int:
        """Tokens of a prompt and its response, at the most; 0 without benchmarks."""
        return max((len(prompt.token_ids) + self.sampling.max_new_tokens for prompt in self.prompts()), default=0)

    def run(self, iteration: int, notify: Callable[[str], None] = lambda text: None) -> EvaluationResult | None:
        """All ranks enter; the main rank gets the result, the others None."""
        found: dict[str, BenchmarkResult] = {}
        for benchmark in self.benchmarks:
            notify(f"evaluating {benchmark.name}: {len(benchmark.prompts)} problems x {self.samples} samples")
            mine = range(self.parallel.dp_rank, len(benchmark.prompts), self.parallel.dp_size)
            responses = self._responses(benchmark, mine)
            if self.parallel.tp_rank or self.parallel.pp_rank or self.parallel.cp_rank:  # they have the same responses
                continue
            texts = [self.tokenizer.decode(s.response_ids, skip_special_tokens=True) for s in responses]
            grades = grade_responses(
                benchmark.grader, [(s.prompt.problem, t) for s, t in zip(responses, texts, strict=True)]
            )
            results: dict[int, ProblemResult] = {}
            for number, i in enumerate(mine):
                part = slice(number * self.samples, (number + 1) * self.samples)
                truncated = [s.finish_reason == "length" for s in responses[part]]
                lengths = [len(s.response_ids) for s in responses[part]]
                results[i] = ProblemResult.from_grades(benchmark.prompts[i].id, grades[part], truncated, lengths)
            gathered = [results] * self.parallel.dp_size
            if self.parallel.dp_size > 1:
                dist.all_gather_object(gathered, results, group=self.parallel.dp_group)
            everything = {i: result for part_ in gathered for i, result in part_.items()}
            found[benchmark.name] = summarise(benchmark.name, self.samples, [everything[i] for i in sorted(everything)])
        return EvaluationResult(iteration, found) if self.parallel.is_main else None

    def _responses(self, benchmark: Benchmark, mine: Sequence[int]) -> list[Sample]:
        """`samples` responses to each problem of `mine`, problem after problem."""
        pairs = [(i, j) for i in range(len(benchmark.prompts)) for j in range(self.samples)]
        wanted = GenerationRequest(
            [benchmark.prompts[i] for i, _ in pairs],
            [(self.seed, "evaluation", benchmark.name, i, j) for i, j in pairs],
            [i * self.samples + j for i in mine for j in range(self.samples)],
            self.sampling,
        )
        parts = self.rollout.collect(self.rollout.submit(wanted))
        return sorted((sample for part in parts for sample in part), key=lambda sample: sample.index)

    def write(self, result: EvaluationResult | None, folder: Path) -> dict[str, float]:
        """The result's file, on the main rank, and its metrics (empty on the others)."""
        if result is None:
            return {}
        result.write(folder)
        return result.to_metrics()
