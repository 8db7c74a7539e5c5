"""The report's figures. Each function draws one from a run's data or raises `MissingMetrics`.

Colours (Okabe and Ito's palette for colour-blind readers) have one meaning: blue is the teacher, red-orange the
student, green the forward KL, purple the reverse KL. Solid lines are gated tokens, dashed lines the other tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from eaopd_megatron.evaluation.estimators import FloatArray, estimate_mean
from eaopd_megatron.plotting.curves import draw_pass_curves, make_panels, style_axes
from eaopd_megatron.reporting.run_data import History, RunData

_TEACHER, _STUDENT, _FORWARD, _REVERSE, _NEUTRAL = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#333333"
_SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
_PHASES = {"rollout": "#E69F00", "teacher": _TEACHER, "student": _STUDENT, "sync": _REVERSE, "checkpoint": "#999999",
          "evaluation": "#56B4E9"}  # fmt: skip
_BY_K = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#004166", "#000000")
_GATED, _OTHER = "-", (0, (4, 2))
_SMOOTH_FROM = 60  # points; fewer are drawn without smoothing

_LineStyle = str | tuple[int, tuple[int, int]]


class MissingMetrics(Exception):
    """Names the metrics that a figure needs and the run has not recorded."""


@dataclass(frozen=True)
class Plot:
    """A figure of the report. name: of its file. caption: how to read it."""

    name: str
    title: str
    draw: Callable[[RunData], Figure]
    caption: str


def smooth(values: FloatArray) -> FloatArray:
    """Return the centred running mean over a thirtieth of the points, with shorter windows at both ends."""
    half = max(1, len(values) // 60)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _draw_objective(run: RunData) -> Figure:
    figure, (left, right) = make_panels(2)
    _require(run, "objective/loss", "objective/reverse_kl")
    _line(left, run, "objective/loss", "loss", _NEUTRAL)
    _line(right, run, "objective/reverse_kl", "reverse KL", _REVERSE)
    _line(right, run, "objective/forward_kl_gated", "forward KL, gated tokens", _FORWARD, _GATED)
    _line(right, run, "objective/forward_kl_ungated", "forward KL, other tokens", _FORWARD, _OTHER)
    style_axes(left, "Loss", "nats / token")
    style_axes(right, "Divergences", "nats / token", floor=True)
    return figure


def _draw_entropy(run: RunData) -> Figure:
    gated = run.has("teacher/entropy_gated") or run.has("student/entropy_gated")
    if not gated:
        _require(run, "teacher/entropy", "student/entropy")
        figure, (axes,) = make_panels(1)
        _line(axes, run, "teacher/entropy", "teacher", _TEACHER)
        _line(axes, run, "student/entropy", "student", _STUDENT)
        style_axes(axes, "Entropy, all tokens", "nats", floor=True)
        return figure
    figure, (left, right) = make_panels(2)
    for role, colour in (("teacher", _TEACHER), ("student", _STUDENT)):
        _line(left, run, f"{role}/entropy_gated", role, colour, _GATED)
        _line(right, run, f"{role}/entropy_ungated", role, colour, _OTHER)
    threshold = run.gate_threshold()
    if threshold is not None and np.isfinite(threshold):
        left.axhline(threshold, color="#888888", linewidth=1, linestyle=":", label=f"threshold {threshold:g}")
    style_axes(left, "Entropy, gated tokens", "nats")
    left.margins(y=0.08)
    style_axes(right, "Entropy, other tokens", "nats", floor=True)
    return figure


def _draw_gate(run: RunData) -> Figure:
    _require(run, "objective/gate_fraction")
    has_clip = run.has("objective/clip_fraction")
    figure, axes = make_panels(2 if has_clip else 1)
    _line(axes[0], run, "objective/gate_fraction", "gate open", _FORWARD)
    if run.series("objective/gate_ambiguous")[1].any():
        _line(axes[0], run, "objective/gate_ambiguous", "gate uncertain", _NEUTRAL)
    style_axes(axes[0], "Gate fraction", "share of tokens", floor=True, percent=True)
    if has_clip:
        _line(axes[1], run, "objective/clip_fraction", "ratio clipped", _REVERSE)
        style_axes(axes[1], "Clip fraction", "share of tokens", floor=True, percent=True)
    return figure


def _draw_evaluation(run: RunData) -> Figure:
    benchmarks = _benchmarks(run)
    # with a single right answer per problem, the number of distinct ones equals pass@K
    several = [
        name
        for name, history in benchmarks.items()
        if any(result.distinct_correct > 1 for _, benchmark in history for result in benchmark.results)
    ]
    figure, axes = make_panels(len(benchmarks) + bool(several))
    for panel, (name, history) in zip(axes, benchmarks.items(), strict=False):
        first = history[0][1]
        passes = [figure for figure in first.figures if figure.startswith("pass@")]
        colours = _BY_K[: len(passes)] if len(passes) <= len(_BY_K) else _cycle(len(passes))
        for name_, colour in zip(passes, colours, strict=True):
            label = f"{name_} = avg@{first.samples}" if name_ == "pass@1" else name_
            _history_line(panel, history, name_, colour, bars=name_ in (passes[0], passes[-1]), end=label)
        style_axes(panel, name, "mean over problems", floor=True, percent=True)
    if several:
        alone = len(several) == 1
        for name, colour in zip(several, _cycle(len(several)), strict=True):
            label = "" if alone else name
            _history_line(axes[-1], benchmarks[name], "distinct_correct", colour, bars=alone, label=label)
        style_axes(axes[-1], "Distinct right answers", "answers / problem", floor=True)
    for panel in axes:
        panel.set_xlim(-0.03 * max(run.last_iteration, 1), 1.03 * max(run.last_iteration, 1))
    return figure


def _history_line(
    axes: Axes, history: History, figure: str, colour: str, *, bars: bool, label: str = "", end: str = ""
) -> None:
    """Draw a figure over the evaluations. bars: with intervals. label: in the legend; end: beside the last point."""
    iterations = [iteration for iteration, _ in history]
    points = [estimate_mean(benchmark.per_problem(figure)) for _, benchmark in history]
    values = [point.value for point in points]
    axes.plot(iterations, values, color=colour, marker="o", markersize=4, linewidth=1.6, label=label or None)
    if bars:
        axes.vlines(iterations, [p.low for p in points], [p.high for p in points], color=colour, linewidth=1, alpha=0.6)
    axes.annotate(end, (iterations[-1], values[-1]), xytext=(7, 0), textcoords="offset points", color=colour,
                  va="center", fontsize=8, annotation_clip=False)  # fmt: skip


def _draw_pass_at_k(run: RunData) -> Figure:
    curves = {
        name: {
            "before training" if iteration == 0 else f"after iteration {iteration}": benchmark.pass_curve()
            for iteration, benchmark in history[:1] + history[1:][-1:]
        }
        for name, history in _benchmarks(run).items()
    }
    return draw_pass_curves(curves, ("#777777", _STUDENT))


def _draw_rollout(run: RunData) -> Figure:
    _require(run, "rollout/length")
    shares = [name for name in ("rollout/stopped", "rollout/truncated") if run.has(name)]
    terminal = run.has("teacher/terminal_logprob")
    figure, axes = make_panels(1 + bool(shares) + terminal)
    _line(axes[0], run, "rollout/length", "response length", _STUDENT)
    style_axes(axes[0], "Response length", "tokens", floor=True)
    if shares:
        _line(axes[1], run, "rollout/stopped", "ended by itself", _FORWARD)
        _line(axes[1], run, "rollout/truncated", "cut at the limit", _NEUTRAL)
        style_axes(axes[1], "How responses end", "share of responses", percent=True)
        axes[1].set_ylim(-0.03, 1.03)
    if terminal:
        _line(axes[-1], run, "teacher/terminal_logprob", "teacher's log-prob.", _TEACHER)
        style_axes(axes[-1], "Stopping token", "nats")
        low, high = axes[-1].get_ylim()
        axes[-1].set_ylim(min(low, -1.0), max(high, 0.0))
    return figure


def _draw_optimizer(run: RunData) -> Figure:
    _require(run, "optimizer/lr")
    has_norm = run.has("optimizer/grad_norm")
    figure, axes = make_panels(2 if has_norm else 1)
    _line(axes[0], run, "optimizer/lr", "learning rate", _NEUTRAL)
    style_axes(axes[0], "Learning rate", "learning rate", floor=True)
    axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if has_norm:
        _line(axes[1], run, "optimizer/grad_norm", "gradient norm", _STUDENT)
        values = run.series("optimizer/grad_norm")[1]
        if (values > 0).all() and values.max() > 8 * values.min():
            axes[1].set_yscale("log")
        style_axes(axes[1], "Gradient norm before clipping", "norm")
    return figure


def _draw_time(run: RunData) -> Figure:
    names = run.names("time/")
    if not names:
        raise MissingMetrics("time/*")
    steps = sum("objective/loss" in record for record in run.records)
    regular = [name for name in names if 2 * len(run.series(name)[0]) > steps] or names
    records = [record for record in run.records if any(name in record for name in regular)]
    iterations = np.array([record["iteration"] for record in records], dtype=np.float64)
    table = np.array([[record.get(name, 0.0) for record in records] for name in regular], dtype=np.float64)
    heights = np.array([smooth(row) for row in table]) if len(records) >= _SMOOTH_FROM else table
    colours = dict(zip(names, _phase_colours(names), strict=True))
    figure, (left, right) = make_panels(2)
    left.stackplot(iterations, heights, colors=[colours[name] for name in regular], linewidth=0)
    left.set_xlim(min(iterations[0], iterations[-1] - 1), iterations[-1])
    rare = [name.removeprefix("time/") for name in names if name not in regular]
    title = "One iteration" + (f", without {' and '.join(rare)}" if rare else "")
    style_axes(left, title, "s", floor=True, legend=False)
    totals = np.array([run.series(name)[1].sum() for name in names])
    positions = np.arange(len(names))[::-1]
    right.barh(positions, totals, color=list(colours.values()))
    for position, total in zip(positions, totals, strict=True):
        share = total / totals.sum() if totals.sum() else 0.0
        right.text(total, position, f"  {total:,.1f} s ({share:.0%})", va="center", fontsize=8)
    right.set_yticks(positions, [name.removeprefix("time/") for name in names])
    style_axes(right, "Complete run", "", xlabel="s", legend=False)
    right.grid(False, axis="y")
    right.set_xlim(0, max(float(totals.max()) * 1.35, 1e-9))
    right.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def _draw_throughput(run: RunData) -> Figure:
    names = run.names("throughput/") + run.names("rollout/tokens_per_second")
    if not names:
        raise MissingMetrics("rollout/tokens_per_second, throughput/*")
    tokens = [name for name in names if name.endswith("tokens_per_second")]
    others = [name for name in names if name not in tokens]
    figure, axes = make_panels(bool(tokens) + len(others))
    for name, colour in zip(tokens, _phase_colours(tokens), strict=True):
        phase = name.removesuffix("tokens_per_second").removeprefix("throughput/").strip("/_").replace("_", " ")
        _line(axes[0], run, name, phase or "complete iteration", colour)
    if tokens:
        style_axes(axes[0], "Tokens per second", "tokens / s", floor=True)
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for panel, name in zip(axes[bool(tokens) :], others, strict=False):
        _line(panel, run, name, name, _NEUTRAL)
        style_axes(panel, name, name.rsplit("/", 1)[-1].replace("_", " "), floor=True, legend=False)
    return figure


# fmt: off
PLOTS = tuple(Plot(*row) for row in (
    ("evaluation", "Evaluation over training", _draw_evaluation,
     "Bars and bands: 95 % bootstrap intervals over problems. Pass@k is the unbiased estimate."),
    ("pass_at_k", "Pass@k before and after", _draw_pass_at_k,
     "A model whose pass@k rises at k = 1 but not at large k has become more certain, not more able."),
    ("objective", "Loss terms", _draw_objective,
     "Means over response tokens. The loss includes the sampled policy-gradient term, which is no distance: judge "
     "progress by the divergences."),
    ("entropy", "Entropies of teacher and student", _draw_entropy,
     "On gated tokens the student should stay close to the teacher; far below it, answers become alike."),
    ("gate", "Gate and clipping", _draw_gate,
     "Gate: share of response tokens whose teacher entropy is above the threshold."),
    ("rollout", "Rollouts", _draw_rollout, "Truncated responses teach the student nothing about stopping."),
    ("optimizer", "Optimiser", _draw_optimizer, "Learning rate, and gradient norm before clipping."),
    ("time", "Where the time goes", _draw_time,
     "Left: seconds of each phase of an iteration, stacked. Right: their sums (same colours)."),
    ("throughput", "Throughput", _draw_throughput, "Tokens per second over all ranks."),
))
# fmt: on


def _line(axes: Axes, run: RunData, name: str, label: str, colour: str, style: _LineStyle = "-") -> None:
    """Draw a metric if it was recorded: few points as they are, many as a smoothed line over the faint values."""
    iterations, values = run.series(name)
    if len(values) >= _SMOOTH_FROM:
        axes.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(iterations, smooth(values), color=colour, linewidth=1.8, linestyle=style, label=label)
    elif len(values):
        axes.plot(iterations, values, color=colour, linewidth=1.6, linestyle=style, label=label,
                  marker="o" if len(values) < 15 else "", markersize=3)  # fmt: skip


def _require(run: RunData, *names: str) -> None:
    """Raise MissingMetrics unless one of the metrics was recorded."""
    if not any(map(run.has, names)):
        raise MissingMetrics(", ".join(names))


def _benchmarks(run: RunData) -> dict[str, History]:
    benchmarks = run.benchmarks()
    if not benchmarks:
        raise MissingMetrics("evaluation/*.json")
    return benchmarks


def _cycle(count: int) -> list[str]:
    return [_SERIES[index % len(_SERIES)] for index in range(count)]


def _phase_colours(names: Sequence[str]) -> list[str]:
    """Return the colour of the phase that each name mentions, and spare colours for other names."""
    spare = iter(_cycle(len(names) + 2)[2:])
    known = [next((colour for phase, colour in _PHASES.items() if phase in name), None) for name in names]
    return [
        colour or (_NEUTRAL if name.startswith("throughput/") else next(spare))
        for colour, name in zip(known, names, strict=True)
    ]
