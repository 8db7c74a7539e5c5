"""Evaluation: graders, the unbiased estimators over samples, and the results' files."""

from eaopd_megatron.evaluation.estimators import avg_at_k, bootstrap_interval, pass_at_k, pass_ks
from eaopd_megatron.evaluation.grade import Grade, Grader
from eaopd_megatron.evaluation.grading import benchmark_name, grade_all, grader_for
from eaopd_megatron.evaluation.results import (
    BenchmarkResult,
    EvaluationResult,
    ProblemResult,
    read_evaluations,
    summarise,
)

__all__ = [
    "BenchmarkResult",
    "EvaluationResult",
    "Grade",
    "Grader",
    "ProblemResult",
    "avg_at_k",
    "benchmark_name",
    "bootstrap_interval",
    "grade_all",
    "grader_for",
    "pass_at_k",
    "pass_ks",
    "read_evaluations",
    "summarise",
]
