"""A plan as JSON."""

from __future__ import annotations

from typing import Any

from eaopd_megatron.planning.hardware import GiB
from eaopd_megatron.planning.planner import Option, Plan, Separate
from eaopd_megatron.planning.servers import Servers
from eaopd_megatron.planning.show import short


def as_json(plan: Plan) -> dict[str, Any]:
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
                "parameters": model.shape.whole().total,
                "active_parameters": model.shape.active(),
            }
            for key, model in (("student", planner.student), *((one.key, one.model) for one in planner.teachers))
        },
        "servers": planner.servers and _servers_json(planner.servers, plan),
        "elsewhere": [_elsewhere_json(one) for one in plan.elsewhere],
        "recipe": plan.own and _option_json(plan.own, plan),
        "layouts": [_option_json(option, plan) for option in plan.together.options],
        "cannot_be_cut": {short(layout): reason for layout, reason in plan.together.refused.items()},
        "student_alone": [_option_json(option, plan) for option in alone],
        "separate_teacher": separate and _elsewhere_json(separate),
        "assumptions": list(planner.assumed.lines(planner.gpu)),
    }


def _servers_json(servers: Servers, plan: Plan) -> dict[str, Any]:
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


def _elsewhere_json(one: Separate) -> dict[str, Any]:
    return {
        "teacher": one.scorer.key,
        "gpus": one.gpus,
        "layout": short(one.scorer.layout),
        "peak_bytes": one.memory.peak,
        "bytes_a_token": one.scorer.row_bytes,
        "bytes_an_iteration": one.sent,
        "estimated_seconds": one.seconds,
    }


def _option_json(option: Option, plan: Plan) -> dict[str, Any]:
    return {
        "overrides": plan.overrides(option),
        "peak_bytes": option.memory.peak,
        "parts": [
            {"role": part.role, "part": part.name, "bytes": part.bytes, "phase": part.phase}
            for part in option.memory.parts
        ],
        "estimated_seconds": option.seconds,
    }
