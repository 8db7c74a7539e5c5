"""Evaluation during training: samples the student on benchmarks with the run's rollout engine and grades it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.distributed.parallel_state import ParallelState, gather_objects
from eaopd_megatron.evaluation.benchmarks import benchmark_name, grader_for, load_prompts
from eaopd_megatron.evaluation.grading import DecodedResponse, grade_problems
from eaopd_megatron.evaluation.results import BenchmarkResult, EvaluationResult, Grader, summarise
from eaopd_megatron.rollout.interface import GenerationRequest, RolloutEngine


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's prompts and its grader."""

    name: str
    prompts: list[Prompt]
    grader: Grader

    @classmethod
    def load(
        cls, source: str, builder: PromptBuilder, first: int | None, report: Callable[[str], None] | None
    ) -> Benchmark:
        """Load a benchmark, or its `first` problems, as `load_prompts` does."""
        prompts = load_prompts(source, builder, first=first, report=report)
        return cls(benchmark_name(source), prompts, grader_for(source, [prompt.problem for prompt in prompts]))


@dataclass(frozen=True)
class Evaluator:
    """Samples `samples` responses per problem with the run's rollout engine.

    Random numbers are a function of (seed, benchmark, problem, sample) alone, so evaluations of one run are compared
    under common random numbers.
    """

    rollout: RolloutEngine
    parallel: ParallelState
    tokenizer: Any
    benchmarks: Sequence[Benchmark]
    samples: int
    sampling: SamplingParams
    seed: int

    def prompts(self) -> list[Prompt]:
        return [prompt for benchmark in self.benchmarks for prompt in benchmark.prompts]

    def longest(self) -> int:
        """Return the largest possible number of tokens of a prompt with its response; 0 without benchmarks."""
        return max((len(prompt.token_ids) + self.sampling.max_new_tokens for prompt in self.prompts()), default=0)

    def run(self, iteration: int, notify: Callable[[str], None] = lambda text: None) -> EvaluationResult | None:
        """Evaluate all benchmarks. Collective; the main rank gets the result, the others None."""
        parallel = self.parallel
        results: dict[str, BenchmarkResult] = {}
        for benchmark in self.benchmarks:
            notify(f"evaluating {benchmark.name}: {len(benchmark.prompts)} problems x {self.samples} samples")
            local = range(parallel.dp_rank, len(benchmark.prompts), parallel.dp_size)
            samples = self._sample(benchmark, local)
            if parallel.tp_rank or parallel.pp_rank or parallel.cp_rank:  # their samples are the same
                continue
            pairs = [(problem, sample) for problem in local for sample in range(self.samples)]
            responses = [
                DecodedResponse(*pair, self._text(one), len(one.response_ids), one.finish_reason)
                for pair, one in zip(pairs, samples, strict=True)
            ]
            graded = grade_problems(benchmark.grader, benchmark.prompts, responses)
            gathered = gather_objects(graded, parallel.dp_size, parallel.dp_group)
            problems = {problem: result for part in gathered for problem, result in part.items()}
            results[benchmark.name] = summarise(benchmark.name, self.samples, [problems[i] for i in sorted(problems)])
        return EvaluationResult(iteration, results) if parallel.is_main else None

    def _text(self, sample: Sample) -> str:
        return str(self.tokenizer.decode(sample.response_ids, skip_special_tokens=True))

    def _sample(self, benchmark: Benchmark, local: Sequence[int]) -> list[Sample]:
        """Return `samples` responses to each problem of `local`, problem after problem."""
        pairs = [(i, j) for i in range(len(benchmark.prompts)) for j in range(self.samples)]
        request = GenerationRequest(
            [benchmark.prompts[i] for i, _ in pairs],
            [(self.seed, "evaluation", benchmark.name, i, j) for i, j in pairs],
            [i * self.samples + j for i in local for j in range(self.samples)],
            self.sampling,
        )
        parts = self.rollout.collect(self.rollout.submit(request))
        return sorted((sample for part in parts for sample in part), key=lambda sample: sample.index)
