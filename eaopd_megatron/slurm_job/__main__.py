"""What the scripts in slurm/lib call: one verb a call."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eaopd_megatron.launch.entrypoint import run_entrypoint
from eaopd_megatron.slurm_job import ROLES


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    return run_entrypoint(lambda: globals()[f"_{options.verb}"](options))


def _arrange(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.allocate import Nodes, arrange

    said = {role: getattr(options, f"{role}_per_node") for role in ROLES}
    per_node = {role: count for role, count in said.items() if count}
    nodes = Nodes(options.student, options.teacher, options.servers, options.gpus, options.nodes, per_node)
    print(arrange(options.recipe, options.overrides, nodes).assignments())


def _step(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.exec_as_rank import Step, become

    gpus = tuple(map(int, options.gpus.split(":"))) if options.gpus else None
    become(Step(options.name, options.folder, gpus), options.command)  # type: ignore[arg-type]


def _serve(options: argparse.Namespace) -> None:
    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.slurm_job.services import serve

    serve(load_recipe(options.recipe, options.overrides), options.listen, options.key_file, options.log)


def _wait(options: argparse.Namespace) -> None:
    from eaopd_megatron.serving.client import read_api_key
    from eaopd_megatron.slurm_job.services import await_services

    urls = await_services(
        options.names,
        options.folder,
        options.logs,
        key=read_api_key(options.key_file),
        minutes=options.minutes,
        report=lambda text: print(f"[job] {text}", file=sys.stderr, flush=True),
    )
    print(f"[{','.join(urls)}]")


def _look(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.preflight import look

    print(look(options.token, options.holds, options.models, options.stage or None).line(), flush=True)


def _compare(options: argparse.Namespace) -> int:
    from eaopd_megatron.slurm_job.preflight import Node, faults, table

    said = options.said.read_text(errors="replace")
    nodes = Node.read(options.reports.read_text(errors="replace"))
    print("\n".join(table(sorted(nodes, key=lambda node: options.nodes.index(node.name)))))
    found = faults(nodes, options.nodes, options.gpus, said)
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(found))


def _probe(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.preflight import probe

    probe()


def _stage(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.services import stage_model

    for model in options.models:
        stage_model(Path(model), options.stage)


def _verdict(options: argparse.Namespace) -> int:
    from eaopd_megatron.slurm_job.failure_report import verdict

    found = verdict(options.srun.read_text(errors="replace"), options.errors, options.logs, options.code)
    print(found.text, file=sys.stderr, flush=True)
    if found.user:
        options.errors.joinpath("user").touch()
    return found.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eaopd_megatron.slurm_job", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    arrange = verbs.add_parser("arrange")
    for role in ROLES:
        arrange.add_argument(f"--{role}", type=int, default=0)
        arrange.add_argument(f"--{role}-per-node", type=int, default=0)
    arrange.add_argument("--gpus", type=int, required=True)
    arrange.add_argument("--nodes", type=int, required=True)
    _takes_recipe(arrange)

    step = verbs.add_parser("step")
    step.add_argument("--name", required=True)
    step.add_argument("--folder", type=Path, required=True)
    step.add_argument("--gpus", default="", help="FIRST:COUNT of the node's")
    step.add_argument("command", nargs=argparse.REMAINDER)

    serve = verbs.add_parser("serve")
    serve.add_argument("--listen", required=True)
    serve.add_argument("--key-file", type=Path, required=True)
    serve.add_argument("--log", type=Path, required=True)
    _takes_recipe(serve)

    wait = verbs.add_parser("wait")
    wait.add_argument("--folder", type=Path, required=True)
    wait.add_argument("--logs", type=Path, required=True)
    wait.add_argument("--key-file", type=Path, required=True)
    wait.add_argument("--minutes", type=float, required=True)
    wait.add_argument("names", nargs="+")

    look = verbs.add_parser("look")
    look.add_argument("--token", type=Path, required=True)
    look.add_argument("--holds", required=True)
    look.add_argument("--stage", default="")
    look.add_argument("models", nargs="*")

    compare = verbs.add_parser("compare")
    compare.add_argument("--reports", type=Path, required=True)
    compare.add_argument("--said", type=Path, required=True)
    compare.add_argument("--gpus", type=int, required=True)
    compare.add_argument("nodes", nargs="+")

    verbs.add_parser("probe")

    stage = verbs.add_parser("stage")
    stage.add_argument("--stage", type=Path, required=True)
    stage.add_argument("models", nargs="+")

    verdict = verbs.add_parser("verdict")
    for name in ("srun", "errors", "logs"):
        verdict.add_argument(f"--{name}", type=Path, required=True)
    verdict.add_argument("--code", type=int, required=True)
    return parser


def _takes_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")


if __name__ == "__main__":
    os.environ.setdefault("RANK", os.environ.get("SLURM_PROCID", "0"))
    sys.exit(main(sys.argv[1:]))
