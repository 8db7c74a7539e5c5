"""Command line of the scripts in slurm/lib: each verb is a function of this folder, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eaopd_megatron.launch.entrypoint import run_entrypoint

_RECIPE = {"recipe": str, "overrides*": str}
_VERBS: dict[str, tuple[str, dict[str, type]]] = {
    "allocate": ("allocate.print_allocation", {"roles": str, "nodes": str, "gpus": int, **_RECIPE}),
    "exec-as-rank": ("ranks.exec_as_rank", {"name": str, "folder": Path, "gpus": str, "command+": str}),
    "serve": ("services.serve_rollouts", {"listen": str, "key-file": Path, "log": Path, **_RECIPE}),
    "restart": (
        "services.restart_service",
        {"name": str, "folder": Path, "log": Path, "lived": float, "max-deaths": int},
    ),
    "count-start": ("services.count_trainer_start", {"folder": Path, "checkpoint": str, "max-restarts": int}),
    "wait": ("services.print_urls", {"folder": Path, "logs": Path, "key-file": Path, "minutes": float, "names+": str}),
    "preflight": ("preflight.print_node_report", {"token": Path, "content": str, "stage": str, "models*": str}),
    "preflight-report": ("preflight.print_preflight", {"reports": Path, "srun": Path, "gpus": int, "names+": str}),
    "probe-network": ("preflight.probe_network", {}),
    "stage": ("services.stage_models", {"stage": Path, "models+": Path}),
    "failure-report": ("ranks.print_failure", {"srun": Path, "errors": Path, "logs": Path, "code": int}),
}
"""verb: (module.function, its arguments). `recipe` and those with * or + are positional, the others are --options."""


def run_verb(words: Sequence[str]) -> int:
    """Call a verb's function with its arguments; return the exit code, which is 1 if it returns False."""
    parser = argparse.ArgumentParser(prog="python -m eaopd_megatron.slurm_job", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, (_, arguments) in _VERBS.items():
        added = verbs.add_parser(verb)
        for name, kind in arguments.items():
            if name == "command+":
                added.add_argument("command", nargs=argparse.REMAINDER)
            elif name[-1] in "*+":
                added.add_argument(name[:-1], type=kind, nargs=name[-1])
            elif name == "recipe":
                added.add_argument(name)
            else:
                added.add_argument(f"--{name}", type=kind, required=True)
    options = vars(parser.parse_args(words))
    module, _, function = _VERBS[options.pop("verb")][0].partition(".")

    def call() -> int:
        done = getattr(importlib.import_module(f"eaopd_megatron.slurm_job.{module}"), function)(**options)
        return int(not done) if isinstance(done, bool) else done or 0

    return run_entrypoint(call)


if __name__ == "__main__":
    os.environ.setdefault("RANK", os.environ.get("SLURM_PROCID", "0"))
    sys.exit(run_verb(sys.argv[1:]))
