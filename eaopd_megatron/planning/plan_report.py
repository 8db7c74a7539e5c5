"""`eaopd plan`: a plan as tables of at most 100 columns, and as JSON."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.supported import ModelInfo, check_context, context_note, find_model
from eaopd_megatron.planning import traffic
from eaopd_megatron.planning.memory import GpuMemory, checkpoint_host_bytes
from eaopd_megatron.planning.planner import TEACHER_GPUS, LayoutOption, LayoutSearch, Plan, Planner, SeparateTeacherPlan
from eaopd_megatron.planning.times import GiB, find_gpu
from eaopd_megatron.planning.workload import PlannedLayout, PlannedServers, PlannedTeacher, Workload

_WIDTH = 100
_MAX_ROWS = 5  # layouts
_TIMED_PHASES = ("generation", "teacher", "student")  # those that differ between layouts
_SHORT_NAMES = {"TP": "tensor", "PP": "pipeline", "CP": "context", "EP": "expert", "ETP": "expert_tensor", "DP": "data"}


def plan_recipe(
    recipe: str,
    overrides: Sequence[str],
    *,
    gpus: int | None,
    gpu: str,
    gpu_memory: float | None,
    teacher: str | None,
    out: Path | None,
) -> None:
    """Print the plan of a recipe and write it to `out`. Raises UserError, with a remedy, if the recipe does not fit."""
    spec = find_gpu(gpu)
    replaced = [] if teacher is None else [f"teacher.model={json.dumps(teacher)}"]
    loaded = load_recipe(recipe, [*overrides, *replaced])
    if teacher is not None and loaded.teachers:
        raise UserError("--teacher is for one teacher; with several give teachers.NAME.model=MODEL as an override")
    planner = Planner(
        student=find_model(loaded.student.model, "student.model"),
        teachers=PlannedTeacher.from_recipe(loaded),
        work=Workload.from_recipe(loaded),
        gpu=spec,
        limit=gpu_memory or spec.memory,
        servers=PlannedServers.from_recipe(loaded),
        transformer_engine=expects_transformer_engine(),
    )
    positions = {"student.model": planner.student.shape.positions}
    positions |= {f"{teacher.key}.model": teacher.model.shape.positions for teacher in planner.teachers}
    check_context(loaded, positions)
    if note := context_note(loaded, positions):
        print(note)
    layout = PlannedLayout.of(loaded.student, gpus)
    plan = Plan(planner, layout, gpus or layout.gpus)
    print_plan(plan)
    if out is not None:
        try:
            out.write_text(json.dumps(plan_as_json(plan), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {out}: {error.strerror}") from None
    if not plan.fits:
        raise UserError(plan.remedy())


def expects_transformer_engine() -> bool:
    """Return whether a plan assumes Transformer Engine's layers: unless this host has a GPU and not the package."""
    return not Path("/proc/driver/nvidia").exists() or importlib.util.find_spec("transformer_engine") is not None


def _layer_lines(plan: Plan) -> Iterator[str]:
    """Yield what depends on Transformer Engine, and what a checkpoint takes of a host."""
    planner, layout, work = plan.planner, plan.layout, plan.planner.work
    if plan.own is None:
        return
    otherwise = replace(planner, transformer_engine=not planner.transformer_engine).memory(layout, work)
    kept = [
        next(part.bytes for part in memory.parts if part.name == "activations")
        for memory in (plan.own.memory, otherwise)
    ]
    names = "Transformer Engine's", "torch's (Transformer Engine is not installed here)"
    other = "without Transformer Engine" if planner.transformer_engine else "with it"
    name = names[not planner.transformer_engine]
    yield f"layers: {name}, activations {_gib(kept[0])} GiB; {other} {_gib(kept[1])}"
    held = planner.student.shape.rank_parameters(layout, plan.own.memory.stage)
    saved = checkpoint_host_bytes(held, layout, work.student_element, distributed=work.distributed_optimizer)
    yield f"run.async_save takes {_gib(saved)} GiB of host memory per rank that writes weights and optimizer states"


def print_plan(plan: Plan) -> None:
    console, planner = Console(width=_WIDTH, highlight=False), plan.planner
    for role, model in (("student", planner.student), *((each.role, each.model) for each in planner.teachers)):
        counts = model.shape.hf_parameters().total, model.shape.active_parameters()
        active = f", {counts[1]:,} a token" if counts[1] != counts[0] else ""
        console.print(f"{role} {model.name}: {counts[0]:,} parameters{active} ({model.source})")
    gpus = f"{plan.gpus} x {planner.gpu.name}, {planner.limit:g} GiB a GPU"
    console.print(f"{gpus}; sizes in GiB a GPU, times estimates\n")
    if plan.own is not None:
        console.print(f"recipe's layout: {_short(plan.layout)}")
        stage = f" (stage {plan.own.memory.stage})" if plan.layout.pipeline_parallel > 1 else ""
        for title, table in (
            (f"memory of the fullest GPU{stage}", _memory_table(plan.own.memory, planner.limit)),
            ("communication", _traffic_table(plan, plan.own)),
            ("estimated time of an iteration", _time_table(plan.own)),
        ):
            console.print(f"\n{title}")
            console.print(table)
        for each in plan.elsewhere:
            line = f"{each.teacher.role} ({each.teacher.placement}): {_separate_line(each)}"
            console.print(f"\n{line}", soft_wrap=True)
    for refusal in plan.refusals:
        console.print(f"the recipe's layout cannot work: {refusal}", soft_wrap=True)
    models = "student and teacher" if any(each.colocated for each in planner.teachers) else "the student alone"
    _print_options(console, plan, plan.together, f"layouts of {models} that fit, best first")
    if not plan.together.options:
        _print_separate(console, plan)
    if line := _server_line(plan):
        console.print(f"\n{line}", soft_wrap=True)
    console.print("\nassumed (times are estimates from these; none was measured):")
    for line in (*planner.assumed.lines(planner.gpu), *_layer_lines(plan)):
        console.print(f"  {line}")


def _short(layout: PlannedLayout) -> str:
    """Return the sizes above one, such as TP2 SP DP4."""
    sizes = {name: getattr(layout, f"{kind}_parallel") for name, kind in _SHORT_NAMES.items()}
    parts = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    if layout.sequence_parallel:
        parts.insert(1, "SP")
    return " ".join(parts) or "one GPU"


def _gib(count: float) -> str:
    return f"{count / GiB:.2f}" if count >= GiB / 100 else f"{count / GiB:.1g}"


def _seconds(count: float) -> str:
    return f"{count:.1f}" if count >= 1 else f"{count:.2g}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right" if name in ("GiB", "seconds", *_TIMED_PHASES) else "left", no_wrap=True)
    return table


def _memory_table(memory: GpuMemory, limit: float) -> Table:
    table = _table("role", "part", "GiB", "while")
    role = ""
    for part in memory.parts:
        table.add_row("" if part.role == role else part.role, part.name, _gib(part.bytes), part.phase)
        role = part.role
    table.add_row("", "reserve", _gib(memory.reserve), "always")
    fits = "fits" if memory.peak <= limit * GiB else "does not fit"
    phases = " + ".join(memory.active_phases(memory.fullest))
    table.add_row("peak", phases, _gib(memory.peak), f"of {limit:g}: {fits}")
    return table


def _traffic_table(plan: Plan, option: LayoutOption) -> Table:
    """Return the traffic of one update, and of each teacher's scoring of an iteration."""
    clock, student, layout = plan.planner.clock(option.work), plan.planner.student.shape, option.layout
    tokens, element = clock.tokens(layout), option.work.student_element
    rows = tokens * clock.response / clock.sequence
    update = traffic.training_traffic(student, layout, tokens, rows, element) + clock.reduction(student, layout)
    flows = [("update", flow) for flow in update]
    here = [each for each in plan.planner.teachers if each.colocated]
    for each in here:
        shared = tokens * option.work.updates / len(here)
        scoring = traffic.forward_traffic(each.shape, layout, shared, each.element)
        flows += [(f"iteration, {each.role}", flow) for flow in scoring]
    table = _table("sent by a GPU", "each", "GiB")
    for when, flow in flows:
        if flow.bytes:
            table.add_row(flow.kind, when, _gib(flow.bytes))
    if not table.row_count:
        table.add_row("nothing", "", "0.00")
    return table


def _time_table(option: LayoutOption) -> Table:
    table = _table("phase", "seconds")
    for phase, seconds in {**option.seconds, "all": option.total}.items():
        table.add_row(phase, _seconds(seconds))
    return table


def _print_options(console: Console, plan: Plan, search: LayoutSearch, title: str) -> None:
    options = search.options
    console.print(f"\n{title} ({len(options)} of {len(options) + len(search.too_large) + len(search.unsupported)})")
    if options:
        table = _table("layout", "GiB", "seconds", *_TIMED_PHASES, "micro-batch", "rollouts", "and")
        for option in options[:_MAX_ROWS]:
            table.add_row(
                _short(option.layout),
                _gib(option.memory.peak),
                _seconds(option.total),
                *(_seconds(option.seconds[phase]) if phase in option.seconds else "" for phase in _TIMED_PHASES),
                f"{option.work.micro_batch_tokens} tokens",
                str(option.work.generated(option.layout)) if plan.planner.servers is None else "served",
                _changes(option.work, plan.planner.work),
            )
        console.print(table)
        console.print(f"best: {plan.overrides(options[0])}", soft_wrap=True)
    for line in _other_layouts(search):
        console.print(line)


def _changes(work: Workload, recipe: Workload) -> str:
    """Return what else saves memory in an option, beyond the recipe."""
    distributed = work.distributed_optimizer and not recipe.distributed_optimizer
    changes = {"distributed": distributed, "recompute": work.recompute != recipe.recompute}
    return ", ".join(name for name, changed in changes.items() if changed)


def _other_layouts(search: LayoutSearch) -> Iterator[str]:
    if search.too_large:
        least = min(search.too_large, key=lambda option: option.memory.peak)
        part = least.memory.largest
        yield (
            f"{len(search.too_large)} need more memory; of them {_short(least.layout)} needs least, "
            f"{_gib(least.memory.peak)} GiB (most: {part.role} {part.name}, {_gib(part.bytes)})"
        )
    for reason, count in Counter(search.unsupported.values()).most_common(_MAX_ROWS):
        yield f"{count} cannot be cut: {reason}"


def _print_separate(console: Console, plan: Plan) -> None:
    """Print the largest teacher on GPUs of its own, and the student's layouts without it."""
    largest = plan.planner.largest_teacher
    if not largest.colocated:
        return
    console.print(f"\n{largest.role} on GPUs of its own ({largest.key}.placement=separate):")
    line = f"none on up to {TEACHER_GPUS[-1]} GPUs" if plan.separate is None else _separate_line(plan.separate)
    console.print(f"  {line}", soft_wrap=True)
    title = f"layouts of the student alone on {plan.gpus} GPUs that fit, best first"
    _print_options(console, plan, plan.alone, title)


def _separate_line(separate: SeparateTeacherPlan) -> str:
    teacher = separate.teacher
    weights = next(part.bytes for part in separate.memory.parts if part.name == "weights")
    replicas = f"{teacher.replicas} x " if teacher.replicas > 1 else ""
    payload = "hidden states" if teacher.signal == "hidden" else f"top-{teacher.top_k}"
    return (
        f"{replicas}{teacher.layout.gpus} GPUs, {_short(teacher.layout)}: {_gib(separate.memory.peak)} GiB a GPU "
        f"(weights {_gib(weights)}), about {separate.seconds:.0f} s an iteration; {payload} of "
        f"{teacher.bytes_per_token:,} bytes a response token over HTTP, at most {separate.sent / 1e9:.2f} GB "
        "an iteration"
    )


def _server_line(plan: Plan) -> str:
    """Return the student on its SGLang servers, or on one for comparison with rollouts in process."""
    planner, shape, element = plan.planner, plan.planner.student.shape, plan.planner.work.student_element
    servers = planner.servers or PlannedServers()
    tokens = servers.cached_tokens(shape, element, planner.limit * GiB)
    share = (
        f"{servers.mem_fraction_static:.0%} of its memory: weights {_gib(servers.weights(shape, element))} GiB, "
        f"key-value cache of {max(0, tokens):,.0f} tokens"
    )
    if planner.servers is None:
        sync = _gib(traffic.weight_sync_traffic(shape, 1, element).bytes)
        line = f"the student on an SGLang server of one GPU (the plan counts rollouts by the trainer), {share}"
        return f"{line}; {sync} GiB a weight update" if tokens > 0 else ""
    if plan.server_refusals:
        return f"the recipe's servers cannot work: {plan.server_refusals[0]}"
    where = "the trainer's GPUs" if servers.colocated else f"{servers.gpus} more GPUs"
    sync = _gib(planner.weight_sync(servers, plan.layout).bytes)
    return (
        f"servers: {servers.count} on {where}, {_short(servers.layout)} each, {share}: "
        f"{int(tokens // planner.work.longest):,} of the longest responses at a time, at most "
        f"{servers.max_concurrent_requests}; {sync} GiB an iteration for weights"
    )


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan's numbers: bytes, seconds, layouts with their overrides."""
    planner = plan.planner
    separate, alone = (None, []) if plan.together.options else (plan.separate, plan.alone.options)
    models = {"student": planner.student, **{each.key: each.model for each in planner.teachers}}
    return {
        "gpus": plan.gpus,
        "gpu": planner.gpu.name,
        "gpu_memory": planner.limit,
        "fits": plan.fits,
        "refusals": plan.refusals,
        "models": {key: _model_as_json(model) for key, model in models.items()},
        "servers": planner.servers and _servers_as_json(planner.servers, plan),
        "elsewhere": [_separate_as_json(each) for each in plan.elsewhere],
        "recipe": plan.own and _option_as_json(plan.own, plan),
        "layouts": [_option_as_json(option, plan) for option in plan.together.options],
        "cannot_be_cut": {_short(layout): reason for layout, reason in plan.together.unsupported.items()},
        "student_alone": [_option_as_json(option, plan) for option in alone],
        "separate_teacher": separate and _separate_as_json(separate),
        "assumptions": list(planner.assumed.lines(planner.gpu)),
    }


def _model_as_json(model: ModelInfo) -> dict[str, Any]:
    counts = {"parameters": model.shape.hf_parameters().total, "active_parameters": model.shape.active_parameters()}
    return {"name": model.name, "source": model.source, **counts}


def _servers_as_json(servers: PlannedServers, plan: Plan) -> dict[str, Any]:
    planner = plan.planner
    shape, element = planner.student.shape, planner.work.student_element
    return {
        "count": servers.count,
        "gpus": servers.gpus,
        "placement": servers.placement,
        "weight_bytes": servers.weights(shape, element),
        "cached_tokens": int(servers.cached_tokens(shape, element, planner.limit * GiB)),
        "weight_sync_bytes": planner.weight_sync(servers, plan.layout).bytes,
        "refusals": plan.server_refusals,
    }


def _separate_as_json(separate: SeparateTeacherPlan) -> dict[str, Any]:
    return {
        "teacher": separate.teacher.key,
        "gpus": separate.gpus,
        "layout": _short(separate.teacher.layout),
        "peak_bytes": separate.memory.peak,
        "bytes_a_token": separate.teacher.bytes_per_token,
        "bytes_an_iteration": separate.sent,
        "estimated_seconds": separate.seconds,
    }


def _option_as_json(option: LayoutOption, plan: Plan) -> dict[str, Any]:
    parts = [{"role": p.role, "part": p.name, "bytes": p.bytes, "phase": p.phase} for p in option.memory.parts]
    numbers = {"peak_bytes": option.memory.peak, "parts": parts, "estimated_seconds": option.seconds}
    return {"overrides": plan.overrides(option), **numbers}
