"""Progress of a run: a live display on a terminal, plain lines elsewhere, and log.txt in both cases."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table
from rich.text import Text

_LINE_INTERVAL = 5.0  # seconds between plain lines, at least
_RATE_WINDOW = 20  # iterations from which the remaining time is estimated

_FIGURES = (  # label, metric, format
    ("loss", "objective/loss", "{:.3f}"),
    ("reverse KL", "objective/reverse_kl", "{:.3f}"),
    ("gated forward KL", "objective/forward_kl_gated", "{:.3f}"),
    ("gated", "objective/gate_fraction", "{:.1%}"),
    ("entropy teacher", "teacher/entropy", "{:.2f}"),
    ("student", "student/entropy", "{:.2f}"),
    ("length", "rollout/length", "{:.0f}"),
    ("truncated", "rollout/truncated", "{:.0%}"),
    ("tokens/s", "rollout/tokens_per_second", "{:,.0f}"),
)


class Progress:
    """A run's display, a context manager of the one process that reports.

    total: iterations of the run; start: iterations already done (a resumed run). Log lines are appended to `log_path`.
    console: standard output by default. clock: returns seconds.
    """

    def __init__(
        self,
        total: int,
        start: int,
        log_path: Path,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._done = start
        self._console = console or Console()
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_RATE_WINDOW + 1)
        self._next_line = 0.0
        self._evaluation = ""
        self._figures: list[tuple[str, str]] = []
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log = log_path.open("a", encoding="utf-8")
        self._bar = ProgressBar(
            TextColumn("distilling"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
        )
        self._task = self._bar.add_task("distilling", total=total, completed=start, left="")
        live = Live(get_renderable=self._render, console=self._console, refresh_per_second=2)
        self._live = live if self._console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
            self._console.show_cursor(True)  # rich hides it, and a killed run could not restore it
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
        self._log.close()

    def message(self, text: str) -> None:
        """Print and log a line with its time, such as a checkpoint or a warning."""
        self._write(text, show=True)

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the metrics of a finished iteration (0: the evaluation before training)."""
        iteration = int(record["iteration"])
        evaluated = _evaluation_text(record)
        if evaluated:
            self._evaluation = evaluated
            prefix = f"evaluation after {iteration} iterations" if iteration else "before training"
            self.message(f"{prefix}: {evaluated}")
        self._figures = [
            (label, form.format(record[name])) for label, name, form in _FIGURES if name in record
        ] or self._figures
        now = self._clock()
        if iteration > self._done or not self._ends:
            self._ends.append(now)
        self._done = max(self._done, iteration)
        self._bar.update(self._task, completed=self._done, left=self._left())
        if not any(name.startswith("objective/") for name in record):
            return
        if now >= self._next_line or iteration >= self._total:
            self._next_line = now + _LINE_INTERVAL
            figures = "  ".join(f"{label} {value}" for label, value in self._figures)
            line = f"iteration {iteration}/{self._total}  {figures}  {self._left()}"
            self._write(line.rstrip(), show=self._live is None)

    def _left(self) -> str:
        """Estimate the remaining time from the last iterations; "" before there are two."""
        if len(self._ends) < 2 or self._done >= self._total:
            return ""
        remaining = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) * (self._total - self._done)
        return f"{timedelta(seconds=round(remaining))} left"

    def _write(self, text: str, *, show: bool) -> None:
        stamp = datetime.now()
        self._log.write(f"{stamp:%Y-%m-%d %H:%M:%S} {text}\n")
        self._log.flush()
        if show:  # soft_wrap: do not fold a log file's lines at 80 columns
            self._console.print(Text(f"{stamp:%H:%M:%S} {text}"), soft_wrap=self._live is None)

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        line = Text()
        for label, value in self._figures:
            line.append(f"{label} ", style="dim").append(value, style="bold").append("   ")
        table.add_row(line)
        if self._evaluation:
            table.add_row(Text.assemble(("last evaluation  ", "dim"), self._evaluation))
        return Group(self._bar.get_renderable(), table)


def _evaluation_text(record: Mapping[str, Any]) -> str:
    """Return "countdown pass@1 0.081 pass@8 0.432" for each benchmark; "" if the record holds no evaluation."""
    passes: dict[str, dict[int, float]] = {}
    for name, value in record.items():
        parts = name.rsplit("/", 1)
        if name.startswith("evaluation/") and parts[1].startswith("pass@"):
            passes.setdefault(parts[0].removeprefix("evaluation/"), {})[int(parts[1].removeprefix("pass@"))] = value
    return ", ".join(
        f"{benchmark} " + " ".join(f"pass@{k} {by_k[k]:.3f}" for k in dict.fromkeys((min(by_k), max(by_k))))
        for benchmark, by_k in passes.items()
    )
