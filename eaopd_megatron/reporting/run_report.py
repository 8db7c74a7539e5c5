"""A run's report: one HTML file that needs no network, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from eaopd_megatron.evaluation.estimators import Estimate, estimate_mean
from eaopd_megatron.evaluation.results import BenchmarkResult
from eaopd_megatron.plotting.curves import to_png
from eaopd_megatron.reporting.alerts import find_warnings
from eaopd_megatron.reporting.plots import PLOTS, MissingMetrics, Plot
from eaopd_megatron.reporting.run_data import RunData
from eaopd_megatron.utils.files import atomic_write

_FACTS = (  # label, metric, format
    ("reverse KL (nats / token)", "objective/reverse_kl", "{:.3f}"),
    ("forward KL on gated tokens (nats / token)", "objective/forward_kl_gated", "{:.3f}"),
    ("gate fraction", "objective/gate_fraction", "{:.1%}"),
    ("tokens whose gate is uncertain", "objective/gate_ambiguous", "{:.1%}"),
    ("student entropy on gated tokens (nats)", "student/entropy_gated", "{:.3f}"),
    ("teacher entropy on gated tokens (nats)", "teacher/entropy_gated", "{:.3f}"),
    ("response length (tokens)", "rollout/length", "{:.1f}"),
    ("responses that end by themselves", "rollout/stopped", "{:.1%}"),
    ("gradient norm", "optimizer/grad_norm", "{:.3g}"),
    ("teacher's log-probability of the stopping token (nats)", "teacher/terminal_logprob", "{:.2f}"),
    ("rollout engine against trainer, log-probability gap (nats)", "rollout/logprob_gap", "{:.2g}"),
    ("importance weight of stale tokens", "rollout/importance_weight", "{:.3f}"),
    ("stale tokens whose weight is clipped", "rollout/importance_clipped", "{:.1%}"),
)
_TEACHER_COLUMNS = (  # label, metric below teachers/NAME/, format
    ("tokens / iteration", "tokens", "{:,.0f}"),
    ("loss (nats / token)", "loss", "{:.3f}"),
    ("entropy (nats)", "entropy", "{:.3f}"),
    ("gate fraction", "gate_fraction", "{:.1%}"),
    ("forward KL, gated (nats / token)", "forward_kl_gated", "{:.3f}"),
    ("log-probability of the stopping token (nats)", "terminal_logprob", "{:.2f}"),
)
_FIGURE_LABELS = {
    "distinct_correct": "distinct right answers / problem",
    "truncated": "answers cut at the limit (share)",
    "length": "tokens of an answer",
    "majority": "most frequent answer is right",
    "lenient_avg": "right in lenient notation",
}


@dataclass(frozen=True)
class Comparison:
    """A figure of a benchmark before training and in the latest evaluation (None if there is only one).

    change: the paired difference; None without a later evaluation, or if its problems differ.
    """

    benchmark: str
    figure: str
    before: Estimate
    after: Estimate | None
    change: Estimate | None

    @property
    def label(self) -> str:
        """The figure in words."""
        name, _, k = self.figure.partition("@")
        return _FIGURE_LABELS.get(name, self.figure) + (f" (@{k})" if k and name in _FIGURE_LABELS else "")

    @property
    def relative_change(self) -> float | None:
        """(after - before) / before, or None if that is undefined."""
        return self.change.value / self.before.value if self.change is not None and self.before.value > 0 else None


def write_run_report(run: Path, out: Path | None = None) -> Path:
    """Write report.html and report/*.png into a run's folder, or into `out`, and return the HTML's path.

    Works during the run: the page names figures whose metrics are missing. Raise UserError for a folder without
    metrics.
    """
    data, folder = RunData.read(run), run if out is None else out
    environment = json.dumps(data.environment, indent=2, ensure_ascii=False) if data.environment else ""
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    page = jinja2.Template(template, **options).render(  # type: ignore[arg-type]
        interval=_interval,
        name=data.folder.resolve().name,
        state=_state(data),
        summary=_summary(data),
        warnings=find_warnings(data),
        comparisons=compare_evaluations(data),
        facts=_facts(data),
        teacher_heads=[label for label, *_ in _TEACHER_COLUMNS],
        teachers=_teachers(data),
        plots=[_draw(plot, data, folder) for plot in PLOTS],
        appendix={"Resolved recipe": data.recipe_text, "Environment": environment},
    )
    target = folder / "report.html"
    atomic_write(target, page)
    return target


def summary_line(run: Path) -> str:
    """Return one line on a run: Pass@1, Pass@K and distinct right answers before -> after, and the entropies."""
    return _summary(RunData.read(run))


def compare_evaluations(run: RunData) -> list[Comparison]:
    """Compare every figure of each benchmark's first evaluation with its last one."""
    rows = []
    for name, history in run.benchmarks().items():
        before, after = history[0][1], history[-1][1] if len(history) > 1 else None
        rows += [_compare(name, figure, before, after) for figure in before.figures if figure != "grader_errors"]
    return rows


def _compare(name: str, figure: str, before: BenchmarkResult, after: BenchmarkResult | None) -> Comparison:
    first = before.per_problem(figure)
    if after is None or figure not in after.figures:
        return Comparison(name, figure, estimate_mean(first), None, None)
    second = after.per_problem(figure)
    same = [result.id for result in before.results] == [result.id for result in after.results]
    change = estimate_mean(second - first) if same else None
    return Comparison(name, figure, estimate_mean(first), estimate_mean(second), change)


def _draw(plot: Plot, run: RunData, folder: Path) -> dict[str, Any]:
    """Write a figure's PNG file and return what the template needs; without its metrics, remove an older file."""
    path = folder / "report" / f"{plot.name}.png"
    try:
        png = to_png(plot.draw(run))
    except MissingMetrics as error:
        path.unlink(missing_ok=True)
        return {"title": plot.title, "missing": error}
    atomic_write(path, png)
    return {"title": plot.title, "caption": plot.caption, "png": base64.b64encode(png).decode("ascii")}


def _state(run: RunData) -> str:
    total = run.total_iterations
    done = f"iteration {run.last_iteration}" + (f" of {total}" if total is not None else "")
    state = "finished" if run.finished else "not finished (running, or stopped)"
    objective = run.setting("objective", "preset")
    student, teachers = run.setting("student", "model"), run.setting("teachers")
    models = [run.setting("teachers", name, "model") for name in teachers or ()] or [run.setting("teacher", "model")]
    pair = f"; {', '.join(map(str, models))} into {student}" if student and all(models) else ""
    return f"{state}: {done}" + (f"; objective {objective}" if objective else "") + pair


def _summary(run: RunData) -> str:
    """Return the main figures before -> after, means over benchmarks, and the student's entropy on gated tokens."""
    parts, rows = [], compare_evaluations(run)
    benchmarks = len({row.benchmark for row in rows})
    for figure in _main_figures({row.figure for row in rows}):
        chosen = [row for row in rows if row.figure == figure]
        before = sum(row.before.value for row in chosen) / len(chosen)
        label = "distinct right answers" if figure == "distinct_correct" else figure.replace("pass@", "Pass@")
        done = [row.after.value for row in chosen if row.after is not None]
        if len(done) < len(chosen):
            parts.append(f"{label} {before:.3f}")
            continue
        after = sum(done) / len(done)
        relative = f" ({100 * (after - before) / before:+.0f} %)" if before > 0 else ""
        parts.append(f"{label} {before:.3f} -> {after:.3f}{relative}")
    student, teacher = run.recent("student/entropy_gated"), run.recent("teacher/entropy_gated")
    if student is not None:
        versus = f" (teacher {teacher:.2f})" if teacher is not None else ""
        parts.append(f"student entropy on gated tokens {student:.2f} nats{versus}")
    loss = run.recent("objective/loss")
    if not rows and loss is not None:
        parts.insert(0, f"loss {run.early('objective/loss'):.3f} -> {loss:.3f}")
    prefix = f"mean of {benchmarks} benchmarks: " if benchmarks > 1 else ""
    return prefix + (", ".join(parts) if parts else f"{run.last_iteration} iterations, nothing evaluated")


def _main_figures(figures: set[str]) -> list[str]:
    """Return pass@1, pass at the largest k and the number of distinct right answers, of those that exist."""
    passes = sorted((name for name in figures if name.startswith("pass@")), key=lambda name: int(name[5:]))
    return list(dict.fromkeys([*passes[:1], *passes[-1:]])) + sorted(figures & {"distinct_correct"})


def _facts(run: RunData) -> list[tuple[str, str]]:
    """Return (label, early -> recent mean, worst case or total) for what was recorded."""
    rows = [(label, _change(run, name, form)) for label, name, form in _FACTS if run.has(name)]
    iterations, minima = run.series("objective/kl_min")
    if minima.size:
        worst = int(minima.argmin())
        rows.append(("smallest KL of any token (nats)", f"{minima[worst]:.2g} at iteration {iterations[worst]:.0f}"))
    seconds = sum(float(run.series(name)[1].sum()) for name in run.names("time/"))
    if seconds:
        rows.append(("time in all phases", _duration(seconds)))
    if run.has("memory/peak"):
        rows.append(("peak memory of a rank", f"{run.series('memory/peak')[1].max() / 2**30:.2f} GiB"))
    return rows


def _teachers(run: RunData) -> dict[str, list[str]]:
    """Return {teacher: a cell per column, early -> recent} of a run with several teachers."""
    names = dict.fromkeys(name.split("/")[1] for name in run.names("teachers/"))
    columns = _TEACHER_COLUMNS
    return {name: [_change(run, f"teachers/{name}/{figure}", form) for _, figure, form in columns] for name in names}


def _change(run: RunData, name: str, form: str) -> str:
    early, recent = run.early(name), run.recent(name)
    return "" if early is None or recent is None else f"{form.format(early)} → {form.format(recent)}"


def _interval(value: Estimate, sign: str = "") -> tuple[str, str]:
    """Return the estimate and its interval as text; adding 0.0 avoids "-0.000"."""
    number, low, high = (format(number + 0.0, f"{sign}.3f") for number in value)
    return number, f"[{low}, {high}]"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
