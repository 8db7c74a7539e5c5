"""Panels of a figure, their style, and curves of pass@k against k with 95 % bootstrap bands over problems."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

_COLOURS = ("#D55E00", "#777777", "#0072B2", "#009E73")


def make_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, at most three in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns if columns < 3 else 12.6, 3.5 * rows), dpi=130, layout="constrained")
    grid = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, grid


# fmt: off
def style_axes(axes: Axes, title: str, ylabel: str, *, floor: bool = False, percent: bool = False,
               legend: bool = True, xlabel: str = "iteration") -> None:
    """Set titles, units, a light grid and the legend; floor: start the y axis at 0 if no value lies below."""
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
# fmt: on


def draw_pass_curves(
    benchmarks: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], colours: Sequence[str] = _COLOURS
) -> Figure:
    """Draw a panel per benchmark and in it a curve per label.

    benchmarks: {benchmark: {label: (pass@k, low, high) for k = 1, 2, ...}}.
    """
    figure, panels = make_panels(len(benchmarks))
    for axes, (name, curves) in zip(panels, benchmarks.items(), strict=True):
        for (label, points), colour in zip(curves.items(), colours, strict=False):
            ks = range(1, len(points) + 1)
            values, low, high = zip(*points, strict=True)
            axes.plot(ks, values, color=colour, marker="o", markersize=4, label=label)
            axes.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
            ticks = sorted({2**i for i in range(len(ks).bit_length())} | {len(ks)})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(k) for k in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        style_axes(axes, name, "pass@k", floor=True, percent=True, xlabel="k (samples)")
    return figure


def to_png(figure: Figure) -> bytes:
    """Render a figure as PNG, without a display and without matplotlib's global state."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
