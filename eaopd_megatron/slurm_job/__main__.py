"""Command line of the scripts in slurm/lib. Each verb imports only what it needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from eaopd_megatron.launch.entrypoint import run_entrypoint
from eaopd_megatron.slurm_job import ROLES


def run_verb(arguments: Sequence[str]) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)
    return run_entrypoint(lambda: globals()[f"_{options.verb.replace('-', '_')}"](options))


def _allocate(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.allocate import JobNodes, allocate

    counts = {role: getattr(options, f"{role}_per_node") for role in ROLES}
    per_node = {role: count for role, count in counts.items() if count}
    names = tuple(options.nodes.split(","))
    nodes = JobNodes(options.student, options.teacher, options.servers, names, options.gpus, per_node)
    print(allocate(options.recipe, options.overrides, nodes).render())


def _exec_as_rank(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.ranks import SlurmStep, exec_as_rank

    gpus = tuple(map(int, options.gpus.split(":"))) if options.gpus else None
    exec_as_rank(SlurmStep(options.name, options.folder, gpus), options.command)  # type: ignore[arg-type]


def _serve(options: argparse.Namespace) -> None:
    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.slurm_job.services import serve_rollouts

    serve_rollouts(load_recipe(options.recipe, options.overrides), options.listen, options.key_file, options.log)


def _restart(options: argparse.Namespace) -> int:
    from eaopd_megatron.slurm_job.services import restart_service

    again = restart_service(
        options.name, options.folder, options.log, lived=options.lived, max_deaths=options.max_deaths
    )
    return 0 if again else 1


def _count_start(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.services import count_trainer_start

    count_trainer_start(options.folder, options.checkpoint, options.max_restarts)


def _wait(options: argparse.Namespace) -> None:
    from eaopd_megatron.serving.http import read_api_key
    from eaopd_megatron.slurm_job.services import wait_for_services

    urls = wait_for_services(
        options.names,
        options.folder,
        options.logs,
        key=read_api_key(options.key_file),
        minutes=options.minutes,
        report=lambda text: print(f"[job] {text}", file=sys.stderr, flush=True),
    )
    print(f"[{','.join(urls)}]")


def _preflight(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.preflight import inspect_node

    print(inspect_node(options.token, options.content, options.models, options.stage or None).line(), flush=True)


def _preflight_report(options: argparse.Namespace) -> int:
    from eaopd_megatron.slurm_job.preflight import NodeReport, find_faults, preflight_report

    nodes = NodeReport.read(options.reports.read_text(errors="replace"))
    print(preflight_report(sorted(nodes, key=lambda node: options.nodes.index(node.name))))
    faults = find_faults(nodes, options.nodes, options.gpus, options.srun.read_text(errors="replace"))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(faults))


def _probe_network(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.preflight import probe_network

    probe_network()


def _stage(options: argparse.Namespace) -> None:
    from eaopd_megatron.slurm_job.services import stage_model

    for model in options.models:
        stage_model(Path(model), options.stage)


def _failure_report(options: argparse.Namespace) -> int:
    from eaopd_megatron.slurm_job.ranks import failure_report

    report = failure_report(options.srun.read_text(errors="replace"), options.errors, options.logs, options.code)
    print(report.text, file=sys.stderr, flush=True)
    if report.user:
        options.errors.joinpath("user").touch()
    return report.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eaopd_megatron.slurm_job", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, description: str, *paths: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=description, description=description)
        for path in paths:
            added.add_argument(f"--{path}", type=Path, required=True)
        return added

    def takes_recipe(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("recipe")
        parser.add_argument("overrides", nargs="*")

    allocate = verb("allocate", "Print, as bash, what the job runs and on which nodes.")
    for role in ROLES:
        allocate.add_argument(f"--{role}", type=int, default=0, help="nodes of the role")
        allocate.add_argument(f"--{role}-per-node", type=int, default=0, help="ranks or services per node")
    allocate.add_argument("--gpus", type=int, required=True, help="GPUs per node")
    allocate.add_argument("--nodes", required=True, help="names, separated by commas")
    takes_recipe(allocate)

    rank = verb("exec-as-rank", "Become COMMAND as this task's rank of the step.", "folder")
    rank.add_argument("--name", required=True)
    rank.add_argument("--gpus", default="", help="FIRST:COUNT of the node's GPUs")
    rank.add_argument("command", nargs=argparse.REMAINDER)

    serve = verb("serve", "Run an SGLang server of the student.", "key-file", "log")
    serve.add_argument("--listen", required=True, help="HOST:PORT")
    takes_recipe(serve)

    restart = verb("restart", "Count the death of a service; exit with 0 if it is to be restarted.", "folder", "log")
    restart.add_argument("--name", required=True)
    restart.add_argument("--lived", type=float, required=True, help="seconds of its last run")
    restart.add_argument("--max-deaths", type=int, required=True, help="in a row")

    start = verb("count-start", "Count a start of the trainer; fail if it is one too many.", "folder")
    start.add_argument("--checkpoint", required=True, help="name of the run's newest one")
    start.add_argument("--max-restarts", type=int, required=True, help="without a new checkpoint")

    wait = verb("wait", "Wait until the named services answer; print their URLs.", "folder", "logs", "key-file")
    wait.add_argument("--minutes", type=float, required=True)
    wait.add_argument("names", nargs="+")

    preflight = verb("preflight", "Print this node's report.", "token")
    preflight.add_argument("--content", required=True, help="of the token file")
    preflight.add_argument("--stage", default="", help="folder for copies of the models")
    preflight.add_argument("models", nargs="*")

    report = verb("preflight-report", "Print the table of nodes and their faults.", "reports", "srun")
    report.add_argument("--gpus", type=int, required=True)
    report.add_argument("nodes", nargs="+")

    verb("probe-network", "Time an all-reduce over the step's ranks.")

    verb("stage", "Copy models to this node's disk.", "stage").add_argument("models", nargs="+")

    failure = verb("failure-report", "Say which rank failed first, and why.", "srun", "errors", "logs")
    failure.add_argument("--code", type=int, required=True)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("RANK", os.environ.get("SLURM_PROCID", "0"))
    sys.exit(run_verb(sys.argv[1:]))
