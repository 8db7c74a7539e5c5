"""Check the results of a run whose servers were killed."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaopd_megatron.config import Recipe
from eaopd_megatron.data.prompts import PromptBuilder, PromptCursor
from eaopd_megatron.data.sources import load_problems
from eaopd_megatron.reporting.metrics_log import METRICS_FILE, read_metrics
from eaopd_megatron.reporting.run_data import RunData

COMPARED = (
    *("objective/loss", "objective/reverse_kl", "student/entropy", "rollout/length", "rollout/truncated"),
    *("optimizer/grad_norm", "evaluation/countdown/pass@1"),
)
"""Means over a run's last iterations that are compared with those of undisturbed runs."""
LOGPROB_GAP = 1e-4
"""Largest gap in nats between the log-probs of servers and trainer in fp32; above it the weights differ."""
T_99 = (63.7, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25)
"""Student's t, two-sided 99 %, for 1 to 9 degrees of freedom."""


def prompts_of(recipe: Recipe) -> list[str]:
    """Ids of the recipe's prompts in the order in which its cursor indexes them."""
    from transformers import AutoTokenizer

    data = recipe.data
    tokenizer = AutoTokenizer.from_pretrained(recipe.student.model)
    settings: dict[str, Any] = {"template": data.template, "suffix": data.suffix, "field": data.prompt_field}
    builder = PromptBuilder(tokenizer, **settings, max_tokens=data.max_prompt_tokens)
    prompts, _ = builder.build(load_problems(data.source, data.split), data.source)
    return [prompt.id for prompt in prompts]


def check_prompts(recipe: Recipe, names: Sequence[str]) -> tuple[int, list[str]]:
    """Return how many prompts the run recorded, and the problems: every iteration must hold each of its prompts once,
    answered by the weights with which it began."""
    cursor = PromptCursor(
        len(names), recipe.train.prompts_per_iteration, recipe.seed, recipe.data.shuffle, recipe.data.last_batch
    )
    count, problems, updates = 0, [], 0
    for iteration in range(recipe.train.iterations):
        path = Path(recipe.run.folder) / "rollouts" / f"{iteration + 1:06d}.jsonl"
        samples = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        trained = Counter(sample["prompt_id"] for sample in samples)
        expected = Counter(names[index] for index in cursor.indices(iteration))
        if trained != expected:
            lost, more = sum((expected - trained).values()), sum((trained - expected).values())
            problems.append(f"iteration {iteration + 1}: {lost} prompts lost, {more} twice or not of this iteration")
        versions = {span[0] for sample in samples for span in sample["weight_versions"]}
        if samples and versions != {updates}:
            problems.append(f"iteration {iteration + 1}: weights {sorted(versions)} instead of {updates}")
        count += len(samples)
        updates += -(-cursor.size(iteration) // recipe.train.mini_batch)
    return count, problems


def check_metrics(recipe: Recipe) -> list[str]:
    """Problems in the metrics: missing iterations, and log-probs that differ from the trainer's."""
    records = read_metrics(Path(recipe.run.folder) / METRICS_FILE)
    problems = []
    if (found := [r["iteration"] for r in records]) != list(range(recipe.train.iterations + 1)):
        problems.append(f"the metrics have {len(found)} records, {found[:1]} to {found[-1:]}, with gaps or duplicates")
    for record in records[1:]:
        gap = record.get("rollout/logprob_gap")
        if gap is None or not gap <= LOGPROB_GAP:
            problems.append(f"iteration {record['iteration']}: the servers' log-probs lie {gap} nats off")
    return problems


def final_metrics(folder: Path) -> dict[str, float]:
    data = RunData.read(folder)
    return {name: value for name in COMPARED if (value := data.recent(name)) is not None}


def compare(metrics: dict[str, float], references: Sequence[dict[str, float]]) -> tuple[list[list[str]], list[str]]:
    """Return a table of the metrics beside those of undisturbed runs, and the differences beyond noise."""
    rows, problems = [], []
    for name, value in metrics.items():
        others = [reference[name] for reference in references]
        if len(others) < 2:  # the noise is unknown
            rows.append([name, f"{value:.4g}", "".join(f"{other:.4g}" for other in others)])
            continue
        mean, spread = statistics.mean(others), statistics.stdev(others)
        rows.append([name, f"{value:.4g}", f"{mean:.4g} ± {spread:.2g}"])
        count = len(others)
        if abs(value - mean) > T_99[min(count - 1, len(T_99)) - 1] * spread * math.sqrt(1 + 1 / count):
            problems.append(f"{name} is {value:.4g}; undisturbed runs have {mean:.4g} ± {spread:.2g}")
    return rows, problems
