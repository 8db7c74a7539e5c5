"""Pass@k against k, with 95 % bootstrap bands over problems."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from eaopd_megatron.evaluation.estimators import estimate, pass_ks
from eaopd_megatron.evaluation.results import BenchmarkResult, EvaluationResult
from eaopd_megatron.reporting.axes import finish, panels

COLOURS = ("#D55E00", "#777777", "#0072B2", "#009E73")


def pass_curve(axes: Axes, benchmark: BenchmarkResult, label: str, colour: str) -> None:
    """The curve of one result, for every k from 1 to the number of samples."""
    ks = list(range(1, benchmark.samples + 1))
    points = [estimate(benchmark.per_problem(f"pass@{k}")) for k in ks]
    axes.plot(ks, [point.value for point in points], color=colour, marker="o", markersize=4, label=label)
    axes.fill_between(ks, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    shown = pass_ks(benchmark.samples)
    axes.set_xticks(shown, [str(k) for k in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def draw_pass_curves(results: Mapping[str, EvaluationResult]) -> Figure:
    """A panel a benchmark, a curve a result; results: label to result."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.benchmarks))
    figure, axes = panels(len(names))
    for panel, name in zip(axes, names, strict=True):
        for (label, result), colour in zip(results.items(), COLOURS, strict=False):
            if name in result.benchmarks:
                pass_curve(panel, result.benchmarks[name], label, colour)
        finish(panel, name, "pass@k", floor=True, percent=True, xlabel="k (samples)", legend=len(results) > 1)
    return figure
