"""Pass@k against k, with 95 % bootstrap bands over problems."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from eaopd_megatron.evaluation.estimators import estimate_mean, pass_ks
from eaopd_megatron.evaluation.results import BenchmarkResult, EvaluationResult


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, three in a row at the most."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns if columns < 3 else 12.6, 3.5 * rows), dpi=130, layout="constrained")
    grid = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, grid


def style_axes(
    axes: Axes,
    title: str,
    ylabel: str,
    *,
    floor: bool = False,
    percent: bool = False,
    legend: bool = True,
    xlabel: str = "iteration",
) -> None:
    """Titles, units and a light grid; floor: the axis begins at 0 where no value is below."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if floor and axes.dataLim.y0 >= 0:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else None)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    if xlabel == "iteration":
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


COLOURS = ("#D55E00", "#777777", "#0072B2", "#009E73")


def pass_curve(axes: Axes, benchmark: BenchmarkResult, label: str, colour: str) -> None:
    """The curve of one result, for every k from 1 to the number of samples."""
    ks = list(range(1, benchmark.samples + 1))
    points = [estimate_mean(benchmark.per_problem(f"pass@{k}")) for k in ks]
    axes.plot(ks, [point.value for point in points], color=colour, marker="o", markersize=4, label=label)
    axes.fill_between(ks, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    shown = pass_ks(benchmark.samples)
    axes.set_xticks(shown, [str(k) for k in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def draw_pass_curves(results: Mapping[str, EvaluationResult]) -> Figure:
    """A panel a benchmark, a curve a result; results: label to result."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.benchmarks))
    figure, axes = make_panels(len(names))
    for panel, name in zip(axes, names, strict=True):
        for (label, result), colour in zip(results.items(), COLOURS, strict=False):
            if name in result.benchmarks:
                pass_curve(panel, result.benchmarks[name], label, colour)
        style_axes(panel, name, "pass@k", floor=True, percent=True, xlabel="k (samples)", legend=len(results) > 1)
    return figure
