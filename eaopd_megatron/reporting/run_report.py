"""A run's report: one HTML file that needs no network, and its pictures as PNG files beside it."""

import base64
import html
import json
from pathlib import Path

from eaopd_megatron.evaluation.estimators import Estimate
from eaopd_megatron.plotting.curves import to_png
from eaopd_megatron.reporting.findings import Comparison, compare_evaluations, find_warnings, summary_of
from eaopd_megatron.reporting.plots import PLOTS, MissingMetrics
from eaopd_megatron.reporting.run_data import RunData
from eaopd_megatron.utils.files import atomic_write

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px;
  margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em; margin-bottom: .1em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .8em 0 }
th, td { padding: .25em .9em .25em 0; text-align: left; vertical-align: top }
th { font-weight: 600; border-bottom: 1px solid #bbb } td.n { text-align: right; font-variant-numeric: tabular-nums }
th.n { text-align: right } td small { color: #666 } tr.group td { border-top: 1px solid #ddd }
.state { color: #555 } .note { color: #555; font-size: .92em } .sure { font-weight: 600 }
.warnings { border-left: 4px solid #d55e00; background: #fdf3ec; padding: .6em 1em }
.warnings li { margin: .2em 0 } img { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
.scroll { overflow-x: auto } summary { cursor: pointer }
"""


def write_run_report(run: Path) -> Path:
    """Writes run/report.html and run/report/*.png from the run's recipe, metrics and evaluations; the HTML's path.

    Works while the run goes on: pictures whose metrics are not there yet are named instead of drawn. UserError if the
    folder holds no metrics at all.
    """
    data = RunData.read(run)
    pictures = []
    for plot in PLOTS:
        path = run / "report" / f"{plot.name}.png"
        heading = f"<h2>{_text(plot.title)}</h2>"
        try:
            png = to_png(plot.draw(data))
        except MissingMetrics as missing:
            path.unlink(missing_ok=True)
            pictures.append(
                f'{heading}\n<p class="note">Not drawn: this run has not recorded {_text(str(missing))}.</p>'
            )
            continue
        atomic_write(path, png)
        source = base64.b64encode(png).decode("ascii")
        pictures.append(
            f'{heading}\n<p class="note">{_text(plot.caption)}</p>\n'
            f'<img alt="{_text(plot.title)}" src="data:image/png;base64,{source}">'
        )
    target = run / "report.html"
    atomic_write(target, _page(data, pictures))
    return target


def summary_line(run: Path) -> str:
    """One line of a run's outcome: Pass@1, Pass@K and distinct right answers before -> after, and the entropies."""
    return summary_of(RunData.read(run))


def _page(run: RunData, pictures: list[str]) -> str:
    name = run.folder.resolve().name
    parts = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="state">{_text(_state(run))}</p>',
        f"<p>{_text(summary_of(run))}.</p>",
        _warning_box(find_warnings(run)),
        "<h2>Before and after</h2>",
        _comparison_table(compare_evaluations(run)),
        "<h2>The run in figures</h2>",
        _facts(run),
        _teachers(run),
        *pictures,
        "<h2>Recipe and environment</h2>",
        _folded("Resolved recipe", run.recipe_text),
        _folded("Environment", json.dumps(run.environment, indent=2, ensure_ascii=False) if run.environment else ""),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)}: distillation report</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _state(run: RunData) -> str:
    total = run.total_iterations
    done = f"iteration {run.last_iteration}" + (f" of {total}" if total is not None else "")
    state = "finished" if run.finished else "not finished (going on, or stopped)"
    objective = run.setting("objective", "preset")
    student, named = run.setting("student", "model"), run.setting("teachers")
    models = [run.setting("teachers", name, "model") for name in named] if named else [run.setting("teacher", "model")]
    pair = f"; {', '.join(map(str, models))} into {student}" if student and all(models) else ""
    return f"{state}: {done}" + (f"; objective {objective}" if objective else "") + pair


def _warning_box(lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<div class="warnings"><strong>Warnings</strong><ul>{items}</ul></div>'


def _comparison_table(rows: list[Comparison]) -> str:
    if not rows:
        return '<p class="note">No evaluation yet: evaluation.benchmarks of the recipe names them.</p>'
    lines = []
    previous = ""
    for row in rows:
        group = ' class="group"' if row.benchmark != previous else ""
        benchmark = _text(row.benchmark) if row.benchmark != previous else ""
        previous = row.benchmark
        change, relative = "", ""
        if row.change is not None:
            change = (
                f'<span class="sure">{_estimate(row.change, sign="+")}</span>'
                if row.change.excludes_zero
                else _estimate(row.change, sign="+")
            )
            relative = f"{100 * row.relative_change:+.0f} %" if row.relative_change is not None else ""
        elif row.after is not None:
            change = "other problems"
        after = _estimate(row.after) if row.after is not None else "not yet"
        cells = "".join(f'<td class="n">{cell}</td>' for cell in (_estimate(row.before), after, change, relative))
        lines.append(f"<tr{group}><td>{benchmark}</td><td>{_text(_figure_label(row.figure))}</td>{cells}</tr>")
    return (
        '<div class="scroll"><table><tr><th>benchmark</th><th>figure</th><th class="n">before</th>'
        '<th class="n">after</th><th class="n">change</th><th class="n">relative</th></tr>\n'
        f"{''.join(lines)}</table></div>\n"
        '<p class="note">In brackets: 95 % bootstrap interval over problems; that of the change is paired, and bold '
        "where it leaves out 0. It does not hold the spread between seeds: a claim needs several runs.</p>"
    )


def _figure_label(figure: str) -> str:
    labels = {
        "distinct_correct": "distinct right answers / problem",
        "truncated": "answers cut at the limit (share)",
        "length": "tokens of an answer",
        "majority": "most frequent answer is right",
        "lenient_avg": "right in lenient notation",
    }
    name, _, k = figure.partition("@")
    return labels.get(name, figure) + (f" (@{k})" if k and name in labels else "")


def _estimate(value: Estimate, sign: str = "") -> str:
    numbers = [format(number + 0.0, f"{sign}.3f") for number in (value.value, value.low, value.high)]
    return f"{numbers[0]} <small>[{numbers[1]}, {numbers[2]}]</small>"


def _facts(run: RunData) -> str:
    """A small table of early -> recent means, worst cases and totals, as far as they were recorded."""
    rows: list[tuple[str, str]] = []
    for label, name, form in (
        ("reverse KL (nats / token)", "objective/reverse_kl", "{:.3f}"),
        ("forward KL on gated tokens (nats / token)", "objective/forward_kl_gated", "{:.3f}"),
        ("gate fraction", "objective/gate_fraction", "{:.1%}"),
        ("tokens whose gate is uncertain", "objective/gate_ambiguous", "{:.1%}"),
        ("student entropy on gated tokens (nats)", "student/entropy_gated", "{:.3f}"),
        ("teacher entropy on gated tokens (nats)", "teacher/entropy_gated", "{:.3f}"),
        ("response length (tokens)", "rollout/length", "{:.1f}"),
        ("responses that stop by themselves", "rollout/stopped", "{:.1%}"),
        ("different responses in a batch (share)", "rollout/distinct", "{:.1%}"),
        ("gradient norm", "optimizer/grad_norm", "{:.3g}"),
        ("teacher's log-probability of the stopping token (nats)", "teacher/terminal_logprob", "{:.2f}"),
        ("rollout engine against trainer, log-probability gap (nats)", "rollout/logprob_gap", "{:.2g}"),
        ("importance weight of stale tokens", "rollout/importance_weight", "{:.3f}"),
        ("stale tokens whose weight is clipped", "rollout/importance_clipped", "{:.1%}"),
    ):
        early, recent = run.early(name), run.recent(name)
        if early is not None and recent is not None:
            rows.append((label, f"{form.format(early)} → {form.format(recent)}"))
    iterations, minima = run.series("objective/kl_min")
    if minima.size:
        worst = int(minima.argmin())
        rows.append(("smallest KL of any token (nats)", f"{minima[worst]:.2g} at iteration {iterations[worst]:.0f}"))
    seconds = sum(float(run.series(name)[1].sum()) for name in run.names("time/"))
    if seconds:
        rows.append(("time in all phases", _duration(seconds)))
    peak = run.series("memory/peak")[1]
    if peak.size:
        rows.append(("peak memory of a rank", f"{peak.max() / 2**30:.2f} GiB"))
    if not rows:
        return '<p class="note">No iteration has been recorded yet.</p>'
    cells = "".join(f'<tr><td>{_text(label)}</td><td class="n">{_text(value)}</td></tr>' for label, value in rows)
    return (
        f"<table>{cells}</table>\n"
        '<p class="note">a → b: mean of the first and of the last 10 iterations, '
        "or of the two halves of a shorter run.</p>"
    )


def _teachers(run: RunData) -> str:
    """What each of several teachers said of its prompts, early -> recent."""
    names = list(dict.fromkeys(name.split("/")[1] for name in run.names("teachers/")))
    if not names:
        return ""
    columns = (
        ("tokens / iteration", "tokens", "{:,.0f}"),
        ("loss (nats / token)", "loss", "{:.3f}"),
        ("entropy (nats)", "entropy", "{:.3f}"),
        ("gate fraction", "gate_fraction", "{:.1%}"),
        ("forward KL, gated (nats / token)", "forward_kl_gated", "{:.3f}"),
        ("log-probability of the stopping token (nats)", "terminal_logprob", "{:.2f}"),
    )
    lines = []
    for name in names:
        cells = ""
        for _, figure, form in columns:
            early, recent = (of(f"teachers/{name}/{figure}") for of in (run.early, run.recent))
            known = early is not None and recent is not None
            cells += f'<td class="n">{f"{form.format(early)} → {form.format(recent)}" if known else ""}</td>'
        lines.append(f"<tr><td>{_text(name)}</td>{cells}</tr>")
    heads = "".join(f'<th class="n">{label}</th>' for label, *_ in columns)
    return (
        "<h2>Teachers</h2>\n"
        f'<div class="scroll"><table><tr><th>teacher</th>{heads}</tr>\n{"".join(lines)}</table></div>'
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _folded(title: str, text: str) -> str:
    if not text:
        return f'<p class="note">{_text(title)}: not recorded.</p>'
    return f"<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
