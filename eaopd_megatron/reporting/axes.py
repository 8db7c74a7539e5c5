"""A picture's panels and what all of them have: titles, units, a light grid."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, three in a row at the most."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(5.2 * columns if columns < 3 else 12.6, 3.5 * rows), dpi=130, layout="constrained")
    grid = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, grid


def finish(
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
