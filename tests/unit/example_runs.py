"""Evaluations and metrics records such as a run writes."""

import math
from typing import Any

import numpy as np

from eaopd_megatron.evaluation.results import EvaluationResult, ProblemResult, summarise


def make_evaluation(
    iteration: int, rate: float, *, names: tuple[str, ...] = ("countdown",), problems: int = 120
) -> EvaluationResult:
    """Return an evaluation of problems of uneven difficulty, 8 samples and several right answers per problem."""
    benchmarks = {}
    for name in names:
        rng = np.random.default_rng(sum(name.encode()))
        results = []
        for index, ease in enumerate(rng.beta(0.4, 0.4 * (1 - rate) / rate, problems)):
            correct = tuple(bool(x) for x in rng.random(8) < ease)
            keys = tuple(f"k{rng.integers(3)}" if right else None for right in correct)
            results.append(
                ProblemResult(
                    f"{name}-{index}", correct, correct, keys, tuple(bool(x) for x in rng.random(8) < 0.01), (9,) * 8
                )
            )
        benchmarks[name] = summarise(name, 8, results)
    return EvaluationResult(iteration, benchmarks)


def make_record(iteration: int, total: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the record of an iteration of a healthy run, with the noise of a small batch."""
    x = iteration / total
    fade, noise = math.exp(-4 * x), rng.normal(0, 1, 12)
    phases = {"rollout": 0.16, "teacher": 0.03, "student": 0.12, "sync": 0.002}
    record = {
        "iteration": iteration,
        "update": 4 * iteration,
        "objective/loss": 0.05 + 0.5 * fade + 0.03 * noise[0],
        "objective/reverse_kl": 0.06 + 0.32 * fade + 0.015 * noise[1],
        "objective/forward_kl_gated": 0.09 + 0.55 * fade + 0.03 * noise[2],
        "objective/forward_kl_ungated": 0.03 + 0.3 * fade + 0.01 * noise[3],
        "objective/gate_fraction": 0.08 + 0.05 * fade + 0.006 * noise[4],
        "objective/clip_fraction": abs(0.004 + 0.002 * noise[5]),
        "objective/gate_ambiguous": 0.0,
        "objective/kl_min": -1e-6 * (1 + abs(noise[6])),
        "teacher/entropy": 0.16 + 0.01 * noise[6],
        "teacher/entropy_gated": 1.03 + 0.02 * noise[7],
        "teacher/entropy_ungated": 0.08 + 0.004 * noise[8],
        "student/entropy": 0.3 + 0.5 * fade,
        "student/entropy_gated": 0.89 + 0.6 * fade + 0.03 * noise[9],
        "student/entropy_ungated": 0.12 + 0.4 * fade + 0.01 * noise[10],
        "teacher/terminal_logprob": -0.1 - 2 * fade - 0.02 * abs(noise[1]),
        "rollout/length": 12 + 2 * fade + 0.2 * noise[11],
        "rollout/stopped": 0.99 - 0.1 * fade,
        "rollout/truncated": 0.01 + 0.1 * fade,
        "rollout/logprob_gap": 1e-5,
        "rollout/version_lag": 0.0,
        "rollout/tokens_per_second": 9000 + 400 * noise[0],
        "throughput/tokens_per_second": 4500 + 150 * noise[1],
        "optimizer/lr": 5e-4 * 0.5 * (1 + math.cos(math.pi * x)),
        "optimizer/grad_norm": 0.4 + 6 * fade * abs(1 + 0.3 * noise[2]),
        "memory/peak": 7.5e8,
        **{f"time/{name}": seconds * (1 + 0.1 * abs(noise[3])) for name, seconds in phases.items()},
    }
    if iteration % 50 == 0:
        record["time/checkpoint"] = 0.4
    return record
