"""A plan as tables of at most 100 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from eaopd_megatron.models.supported import ModelInfo
from eaopd_megatron.planning import traffic
from eaopd_megatron.planning.hardware import GiB
from eaopd_megatron.planning.layouts import PlannedLayout
from eaopd_megatron.planning.memory import GpuMemory, PlannedServers
from eaopd_megatron.planning.planner import TEACHER_GPUS, LayoutOption, LayoutSearch, Plan, SeparateTeacherPlan

_WIDTH = 100
_MAX_ROWS = 5  # layouts
SERVER_SHARE = 0.85  # of a GPU, for weights and cache; SGLang's --mem-fraction-static
_TIMED_PHASES = ("generation", "teacher", "student")  # whose times differ from layout to layout
_SHORT_NAMES = (
    ("TP", "tensor_parallel"),
    ("PP", "pipeline_parallel"),
    ("CP", "context_parallel"),
    ("EP", "expert_parallel"),
    ("ETP", "expert_tensor_parallel"),
    ("DP", "data_parallel"),
)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console(width=_WIDTH, highlight=False)
    planner = plan.planner
    for role, model in (("student", planner.student), *((one.role, one.model) for one in planner.teachers)):
        console.print(f"{role} {model.name}: {_size(model)} ({model.source})")
    console.print(
        f"{plan.gpus} x {planner.gpu.name}, {planner.limit:g} GiB a GPU; sizes in GiB a GPU, times estimates\n"
    )
    if plan.own is not None:
        console.print(f"recipe's layout: {short_layout(plan.layout)}")
        stage = f" (stage {plan.own.memory.stage})" if plan.layout.pipeline_parallel > 1 else ""
        for title, table in (
            (f"memory of the fullest GPU{stage}", _memory(plan.own.memory, planner.limit)),
            ("communication", _traffic(plan, plan.own)),
            ("estimated time of an iteration", _times(plan.own)),
        ):
            console.print(f"\n{title}")
            console.print(table)
        for one in plan.elsewhere:
            console.print(f"\n{one.scorer.role} ({one.scorer.placement}): {separate_line(one)}", soft_wrap=True)
    for refusal in plan.refusals:
        console.print(f"the recipe's layout cannot work: {refusal}")
    here = "student and teacher" if any(one.colocated for one in planner.teachers) else "the student alone"
    _options(console, plan, plan.together, f"layouts of {here} that fit, best first")
    if not plan.together.options:
        _apart(console, plan)
    if server := _servers(plan):
        console.print(f"\n{server}", soft_wrap=True)
    console.print("\nassumed (times are estimates from these; none was measured):")
    for line in planner.assumed.lines(planner.gpu):
        console.print(f"  {line}")


def short_layout(layout: PlannedLayout) -> str:
    """The numbers above one, such as TP2 SP DP4."""
    parts = [f"{name}{getattr(layout, key)}" for name, key in _SHORT_NAMES if getattr(layout, key) > 1]
    if layout.sequence_parallel:
        parts.insert(1, "SP")
    return " ".join(parts) or "one GPU"


def _size(model: ModelInfo) -> str:
    whole, active = model.shape.hf_parameters().total, model.shape.active_parameters()
    return f"{whole:,} parameters" + (f", {active:,} a token" if active != whole else "")


def _gib(count: float) -> str:
    return f"{count / GiB:.2f}" if count >= GiB / 100 else f"{count / GiB:.1g}"


def _seconds(count: float) -> str:
    return f"{count:.1f}" if count >= 1 else f"{count:.2g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right" if name in ("GiB", "seconds", *_TIMED_PHASES) else "left", no_wrap=True)
    return table


def _memory(memory: GpuMemory, limit: float) -> Table:
    table = _table("role", "part", "GiB", "while")
    role = ""
    for part in memory.parts:
        table.add_row("" if part.role == role else part.role, part.name, _gib(part.bytes), part.phase)
        role = part.role
    table.add_row("", "reserve", _gib(memory.reserve), "always")
    full = "fits" if memory.peak <= limit * GiB else "does not fit"
    table.add_row("peak", " + ".join(memory.active_phases(memory.fullest)), _gib(memory.peak), f"of {limit:g}: {full}")
    return table


def _traffic(plan: Plan, option: LayoutOption) -> Table:
    """Of one update, and of the teacher's scoring of an iteration."""
    clock = plan.planner.clock(option.work)
    student, layout = plan.planner.student.shape, option.layout
    tokens = clock.tokens(layout)
    rows = tokens * clock.response / clock.sequence
    table = _table("sent by a GPU", "each", "GiB")
    update = [
        *traffic.training_traffic(student, layout, tokens, rows, option.work.student_element),
        *clock.reduction(student, layout),
    ]
    here = [one for one in plan.planner.teachers if one.colocated]
    shared = tokens * option.work.updates / max(1, len(here))  # of the responses, by each teacher
    scored = [
        (f"iteration, {one.role}", traffic.forward_traffic(one.shape, layout, shared, one.element)) for one in here
    ]
    for each, flows in (("update", update), *scored):
        for flow in flows:
            if flow.bytes:
                table.add_row(flow.kind, each, _gib(flow.bytes))
    if not table.row_count:
        table.add_row("nothing", "", "0.00")
    return table


def _times(option: LayoutOption) -> Table:
    table = _table("phase", "seconds")
    for phase, seconds in option.seconds.items():
        table.add_row(phase, _seconds(seconds))
    table.add_row("all", _seconds(option.total))
    return table


def _options(console: Console, plan: Plan, search: LayoutSearch, title: str) -> None:
    options = search.options
    console.print(f"\n{title} ({len(options)} of {len(options) + len(search.too_large) + len(search.unsupported)})")
    if options:
        table = _table("layout", "GiB", "seconds", *_TIMED_PHASES, "micro-batch", "rollouts", "and")
        for option in options[:_MAX_ROWS]:
            table.add_row(
                short_layout(option.layout),
                _gib(option.memory.peak),
                _seconds(option.total),
                *(_seconds(option.seconds[phase]) if phase in option.seconds else "" for phase in _TIMED_PHASES),
                f"{option.work.micro_batch_tokens} tokens",
                str(option.work.generated(option.layout)) if plan.planner.servers is None else "served",
                _saved(option, plan),
            )
        console.print(table)
        console.print(f"best: {plan.overrides(options[0])}", soft_wrap=True)
    for line in _others(search):
        console.print(line)


def _saved(option: LayoutOption, plan: Plan) -> str:
    """What else saves memory there, beyond the recipe."""
    work, recipe = option.work, plan.planner.work
    said = ["distributed"] if work.distributed_optimizer and not recipe.distributed_optimizer else []
    return ", ".join([*said, "recompute"] if work.recompute != recipe.recompute else said)


def _others(search: LayoutSearch) -> Iterator[str]:
    """What became of the other layouts."""
    if search.too_large:
        least = min(search.too_large, key=lambda option: option.memory.peak)
        part = least.memory.largest
        yield (
            f"{len(search.too_large)} need more memory; of them {short_layout(least.layout)} needs least, "
            f"{_gib(least.memory.peak)} GiB (most: {part.role} {part.name}, {_gib(part.bytes)})"
        )
    reasons = Counter(search.unsupported.values())
    for reason, count in reasons.most_common(_MAX_ROWS):
        yield f"{count} cannot be cut: {reason}"


def _apart(console: Console, plan: Plan) -> None:
    planner = plan.planner
    largest = planner.largest_teacher
    if not largest.colocated:
        return
    if largest.shape.experts and not planner.student.shape.experts:
        console.print("beside a student without experts only pipeline stages can share the teacher's experts")
    console.print(f"\n{largest.role} on GPUs of its own ({largest.key}.placement=separate):")
    where = f"none on up to {TEACHER_GPUS[-1]} GPUs" if plan.separate is None else separate_line(plan.separate)
    console.print(f"  {where}", soft_wrap=True)
    _options(console, plan, plan.alone, f"layouts of the student alone on {plan.gpus} GPUs that fit, best first")


def separate_line(separate: SeparateTeacherPlan) -> str:
    """A separate teacher in one line."""
    parts = {part.name: part.bytes for part in separate.memory.parts}
    scorer = separate.scorer
    copies = f"{scorer.replicas} x " if scorer.replicas > 1 else ""
    said = "hidden states" if scorer.signal == "hidden" else f"top-{scorer.top_k}"
    return (
        f"{copies}{scorer.layout.gpus} GPUs, {short_layout(scorer.layout)}: {_gib(separate.memory.peak)} GiB a GPU "
        f"(weights {_gib(parts['weights'])}), about {separate.seconds:.0f} s an iteration; {said} of "
        f"{scorer.bytes_per_token:,} bytes a response token over HTTP, at most {separate.sent / 1e9:.2f} GB "
        "an iteration"
    )


def _servers(plan: Plan) -> str:
    """The student on its SGLang servers, or on one for comparison with rollouts in process."""
    planner, shape, element = plan.planner, plan.planner.student.shape, plan.planner.work.student_element
    servers = planner.servers or PlannedServers(memory_fraction=SERVER_SHARE)
    tokens = servers.cached_tokens(shape, element, planner.limit * GiB)
    said = (
        f"{servers.memory_fraction:.0%} of its memory: weights {_gib(servers.weights(shape, element))} GiB, key-value "
        f"cache of {max(0, tokens):,.0f} tokens"
    )
    if planner.servers is None:
        sync = traffic.weight_sync_traffic(shape, 1, element)
        return (
            f"the student on an SGLang server of one GPU (the plan counts rollouts by the trainer), {said}; "
            f"{_gib(sync.bytes)} GiB a weight update"
            if tokens > 0
            else ""
        )
    if plan.unserved:
        return f"the recipe's servers cannot work: {plan.unserved[0]}"
    sync = planner.weight_sync(servers, plan.layout)
    where = "the trainer's GPUs" if servers.colocated else f"{servers.gpus} more GPUs"
    return (
        f"servers: {servers.count} on {where}, {short_layout(servers.layout)} each, {said}: "
        f"{int(tokens // planner.work.longest):,} of the longest responses at a time, at most {servers.max_running}; "
        f"{_gib(sync.bytes)} GiB an iteration for weights"
    )


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan's numbers: bytes, seconds, layouts with their overrides."""
    planner = plan.planner
    separate, alone = (None, []) if plan.together.options else (plan.separate, plan.alone.options)
    return {
        "gpus": plan.gpus,
        "gpu": planner.gpu.name,
        "gpu_memory": planner.limit,
        "fits": plan.fits,
        "refusals": plan.refusals,
        "models": {
            key: {
                "name": model.name,
                "source": model.source,
                "parameters": model.shape.hf_parameters().total,
                "active_parameters": model.shape.active_parameters(),
            }
            for key, model in (("student", planner.student), *((one.key, one.model) for one in planner.teachers))
        },
        "servers": planner.servers and _servers_json(planner.servers, plan),
        "elsewhere": [_elsewhere_json(one) for one in plan.elsewhere],
        "recipe": plan.own and _option_json(plan.own, plan),
        "layouts": [_option_json(option, plan) for option in plan.together.options],
        "cannot_be_cut": {short_layout(layout): reason for layout, reason in plan.together.unsupported.items()},
        "student_alone": [_option_json(option, plan) for option in alone],
        "separate_teacher": separate and _elsewhere_json(separate),
        "assumptions": list(planner.assumed.lines(planner.gpu)),
    }


def _servers_json(servers: PlannedServers, plan: Plan) -> dict[str, Any]:
    planner = plan.planner
    shape, element = planner.student.shape, planner.work.student_element
    return {
        "count": servers.count,
        "gpus": servers.gpus,
        "placement": servers.placement,
        "weight_bytes": servers.weights(shape, element),
        "cached_tokens": int(servers.cached_tokens(shape, element, planner.limit * GiB)),
        "weight_sync_bytes": planner.weight_sync(servers, plan.layout).bytes,
        "refusals": plan.unserved,
    }


def _elsewhere_json(one: SeparateTeacherPlan) -> dict[str, Any]:
    return {
        "teacher": one.scorer.key,
        "gpus": one.gpus,
        "layout": short_layout(one.scorer.layout),
        "peak_bytes": one.memory.peak,
        "bytes_a_token": one.scorer.bytes_per_token,
        "bytes_an_iteration": one.sent,
        "estimated_seconds": one.seconds,
    }


def _option_json(option: LayoutOption, plan: Plan) -> dict[str, Any]:
    return {
        "overrides": plan.overrides(option),
        "peak_bytes": option.memory.peak,
        "parts": [
            {"role": part.role, "part": part.name, "bytes": part.bytes, "phase": part.phase}
            for part in option.memory.parts
        ],
        "estimated_seconds": option.seconds,
    }
