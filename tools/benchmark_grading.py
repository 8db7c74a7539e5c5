"""Measures how long grading mathematics takes when some answers hang, crash or flood a grader.

    python tools/benchmark_grading.py --benchmarks FILE.jsonl [FILE.jsonl ...] [--answers 10000] [--pathological 0.02]

An answer to a random problem is its gold, the gold in another notation, another problem's gold, a random number or a
pathological text. Prints seconds, answers per second, verdicts, errors, and the memory of this process and of the
graders before and after.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

import psutil

from eaopd_megatron.data.sources import Problem
from eaopd_megatron.evaluation.benchmarks import load_benchmark
from eaopd_megatron.evaluation.grading import MathGrader
from eaopd_megatron.launch.entrypoint import run_entrypoint

PATHOLOGICAL = (
    r"\boxed{10^{10^{10}}}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{2^{2^{2^{2^{2^{2}}}}} + x}",
    r"\boxed{(1+x)^{100000}}",
    r"\boxed{1000000!}",
    r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k}}",
    r"\boxed{\int_0^1 x^{x^{x^{x}}} dx}",
    r"\boxed{" * 3000,
    "{" * 50_000 + r"\boxed{" + "}" * 3,
    r"\boxed{" + "(" * 900 + "}",
    r"\boxed{" + r"\frac{1}{" * 90 + "2" + "}" * 90 + "}",
    r"\boxed{" + "1+" * 450 + "1}",
    r"\boxed{" + "x" * 100_000 + "}",
    "the answer is 5. " * 6000,
    r"\boxed{\x00\ud800 \u202e 5}",
    "\x00\ud83d\ude00\\boxed{\U0001f600}",
    r"\boxed{'; import os; os.abort()}",
    r"\boxed{__import__('os').abort()}",
    r"\boxed{10 " + "hours " * 60 + "!}",
    r"\boxed{10 " + "m" * 60 + "!}",
    r"\boxed{10" + r"\,\text{m}" * 90 + "!}",
    r"\boxed{" + " ~" * 200 + "^" + " " * 500 + "!}",
    r"\boxed{" + "9" * 900 + "!!e}",
)


def answers(problems: Sequence[Problem], count: int, pathological: float, seed: int) -> list[tuple[Problem, str]]:
    """Return `count` (problem, response) pairs; `pathological` is the share of pathological responses."""
    generator = random.Random(seed)
    made = []
    for _ in range(count):
        problem, other = generator.sample(list(problems), 2)
        gold = problem["answer"]
        texts = (
            gold,
            f"x = {gold}",
            other["answer"],
            rf"{gold} + {generator.randint(1, 9)}",
            generator.randint(0, 999),
        )
        text = rf"So the answer is \boxed{{{generator.choice(texts)}}}."
        if generator.random() < pathological:
            text = generator.choice(PATHOLOGICAL)
        made.append((problem, text))
    return made


def memory() -> tuple[float, float]:
    """Return the resident memory of this process and of its children, in MiB."""
    process = psutil.Process()
    return process.memory_info().rss / 2**20, sum(c.memory_info().rss for c in process.children(True)) / 2**20


def run(options: argparse.Namespace) -> int:
    """Grade and print. Raise UserError for a file that cannot be read."""
    problems = [problem for file in options.benchmarks for problem in load_benchmark(file)]
    grader = MathGrader(workers=options.workers)
    grader.gold_kinds(["x+1"] * options.workers)
    items = answers(problems, options.answers, options.pathological, options.seed)
    before, start = memory(), time.monotonic()
    grades = grader.grade_many(items)
    seconds = time.monotonic() - start
    after = memory()
    cpu = psutil.Process().cpu_times()
    used = [process.cpu_times() for process in psutil.Process().children(True)]
    seconds_of_cpu = sum(t.user + t.system + t.children_user + t.children_system for t in (cpu, *used))
    counts = Counter("right" if g.correct else "right leniently" if g.lenient else "wrong" for g in grades)
    print(
        f"{len(items)} answers in {seconds:.1f} s ({len(items) / seconds:.0f} per second), {options.workers} workers; "
        f"{seconds_of_cpu:.0f} s of CPU time including the start"
    )
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())), end="; ")
    print(f"errors (time-outs, exceptions, deaths) {sum(grade.error for grade in grades)}")
    print(f"MiB of this process and of the graders: {before[0]:.0f}, {before[1]:.0f} -> {after[0]:.0f}, {after[1]:.0f}")
    grader.close()
    print(f"processes left: {len(psutil.Process().children(True))}")
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure how long grading mathematics takes.", allow_abbrev=False)
    parser.add_argument("--benchmarks", nargs="+", required=True, metavar="FILE", help="names or .jsonl files")
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--pathological", type=float, default=0.02, help="share of pathological answers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_entrypoint(lambda: run(parse(sys.argv[1:]))))
