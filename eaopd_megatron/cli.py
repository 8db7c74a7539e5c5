"""The command `eaopd`. Each verb imports what it needs when it is called, so that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from eaopd_megatron import __version__
from eaopd_megatron.errors import UserError
from eaopd_megatron.launch.entrypoint import as_user_error

app = typer.Typer(
    help="On-policy distillation for Megatron-Core with the entropy-aware objective.",
    epilog="Start with: eaopd train recipes/countdown/eopd.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="a.b.c=value", help="Settings that replace the recipe's.", show_default=False),
]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train a student. Run again, it goes on from the last checkpoint.

    Starts its own ranks on this host; under torchrun or srun it joins theirs.
    """
    from eaopd_megatron.launch.local_ranks import is_started_rank, launch_ranks, student_world_size

    arguments = ["train", recipe, *(overrides or [])]
    if is_started_rank():
        _join(arguments)
        return

    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.training.run_folder import finished_message

    loaded = load_recipe(recipe, overrides or [])
    if finished := finished_message(loaded):
        print(finished)
        return
    logs = Path(loaded.run.folder) / "logs"
    raise typer.Exit(launch_ranks(arguments, student_world_size(loaded.student), log_folder=logs))


@app.command()
def teach(
    recipe: RecipeFile,
    overrides: Overrides = None,
    teacher: Annotated[
        str, typer.Option(metavar="NAME", help="Which of the recipe's teachers, where it has several.")
    ] = "",
) -> None:
    """Serve the recipe's separate teacher over HTTP, until SIGTERM.

    Starts its own ranks on this host; under torchrun or srun it joins theirs.
    """
    from eaopd_megatron.launch.local_ranks import is_started_rank, launch_ranks, teacher_world_size

    arguments = ["teach", recipe, teacher, *(overrides or [])]
    if is_started_rank():
        _join(arguments)
        return

    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.config.schema import select_separate_teacher

    layout = select_separate_teacher(load_recipe(recipe, overrides or []), teacher).parallel_layout
    raise typer.Exit(launch_ranks(arguments, teacher_world_size(layout)))


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder or hub id, a run's folder or one of its checkpoints.",
            show_default=False,
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="BENCHMARK", help="Further benchmarks after --benchmarks.", show_default=False),
    ] = None,
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="countdown, math500, aime24, aime25, amc23, minerva_math, olympiadbench; a .jsonl or .parquet file; "
            "hub:owner/name[:config][@revision].",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Responses a problem.")] = 8,
    problems: Annotated[int | None, typer.Option(min=1, help="The first so many.", show_default="all")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the most probable token.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.8,
    max_response_tokens: Annotated[int, typer.Option(min=1)] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="Of the local engine's random numbers.")] = 1234,
    template: Annotated[
        str | None,
        typer.Option(metavar="chat|base|raw", show_default="chat where the tokenizer has one, else raw"),
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="A line after each problem.", show_default="asks for a box; Countdown: none")
    ] = None,
    fields: Annotated[
        str | None,
        typer.Option(metavar="NAME=FIELD,...", help="A file's fields for problem, answer, id.", show_default=False),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="local|sglang", help="local: ranks started for it; sglang: servers.")
    ] = "local",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks, or GPUs a server, that share the model.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that local ranks generate together.")] = 256,
    servers: Annotated[int, typer.Option(min=1, help="Servers to start.")] = 1,
    server_url: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A server that runs already.", show_default=False)
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Such servers' key, mode 0600.", show_default=False)] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Responses that a server writes at the same time.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder; an unfinished evaluation in it goes on.", show_default="evaluations/MODEL"),
    ] = None,
    regrade: Annotated[bool, typer.Option("--regrade", help="Grade the folder's responses again.")] = False,
    compare: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Another evaluation to compare with.", show_default=False)
    ] = None,
) -> None:
    """Score a model on benchmarks: avg@k, pass@k, majority vote, with intervals."""
    from eaopd_megatron.data.sources import FieldNames
    from eaopd_megatron.evaluation.evaluate import EvaluationRequest
    from eaopd_megatron.evaluation.evaluate import run_evaluation as run
    from eaopd_megatron.evaluation.generate import ServerChoice

    names = [name.strip() for part in [*(benchmarks or []), *(more or [])] for name in part.split(",") if name.strip()]
    request = EvaluationRequest(
        model=model,
        benchmarks=list(dict.fromkeys(names)),
        samples=samples,
        problems=problems,
        temperature=temperature,
        top_p=top_p,
        max_response_tokens=max_response_tokens,
        seed=seed,
        template=_one_of("--template", template, "chat", "base", "raw") if template else None,
        suffix=suffix,
        fields=None if fields is None else FieldNames.parse(fields),
        engine=_one_of("--engine", engine, "local", "sglang"),
        tensor_parallel=tensor_parallel,
        batch_size=batch_size,
        servers=ServerChoice(tuple(server_url or ()), servers, tensor_parallel, max_running, api_key_file=api_key_file),
        out=out,
    )
    raise typer.Exit(run(request, regrade=regrade, compare=compare))


def _one_of(option: str, value: str, *allowed: str) -> Any:
    if value not in allowed:
        raise UserError(f"{option} {value}: expected {', '.join(allowed)}")
    return value


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.", show_default=False)]) -> None:
    """Write report.html, with its plots, into a run's folder."""
    from eaopd_megatron.reporting.run_report import write_run_report

    print(write_run_report(run))


@app.command()
def show(
    recipe: RecipeFile,
    overrides: Overrides = None,
    key: Annotated[
        str | None, typer.Option(metavar="a.b.c", help="Only this setting's value.", show_default=False)
    ] = None,
) -> None:
    """Print a recipe as it would be run: its bases, its overrides and every default."""
    from eaopd_megatron.config import dump_recipe, load_recipe, recipe_value

    loaded = load_recipe(recipe, overrides or [])
    if key is None:
        print(dump_recipe(loaded), end="")
    else:
        value = recipe_value(loaded, key)
        print(value if isinstance(value, str) else json.dumps(value))


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs to lay out.", show_default="the recipe's, or one host of 8")
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="a100, h100, h200 or b200.")] = "h100",
    gpu_memory: Annotated[
        float | None, typer.Option(min=1.0, metavar="GIB", help="Memory of a GPU.", show_default="as its maker says")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another teacher than the recipe's.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the plan's numbers.", show_default=False)
    ] = None,
) -> None:
    """Estimate memory, traffic and time before a run, and the layouts that fit. Exit code 1: the recipe's does not."""
    from eaopd_megatron.planning.plan_recipe import plan_recipe as run

    run(recipe, overrides or [], gpus=gpus, gpu=gpu, gpu_memory=gpu_memory, teacher=teacher, out=out)


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="Also try its student and teachers.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine: versions, devices, backends, and what is missing or harmful. Exit code 1: something is.

    With a recipe its student writes a few responses, on ranks of their own, and its teachers score how they stop: exit
    code 1 as well where the two do not agree.
    """
    from eaopd_megatron.diagnostics.machine import check_machine as examine

    harmful = examine()
    if recipe is None:
        raise typer.Exit(harmful)
    from eaopd_megatron.diagnostics.eos_check import check_eos

    raise typer.Exit(check_eos(recipe, overrides or []) or harmful)


def _join(arguments: list[str]) -> None:
    """This process is the rank that torchrun or srun started."""
    from eaopd_megatron import worker
    from eaopd_megatron.launch.local_ranks import rank_environment

    os.environ.update(rank_environment())
    if code := worker.run_rank(arguments):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a failed rank must not wait for the others in the destructors of its process groups


def _version(wanted: bool) -> None:
    if wanted:
        print(f"eaopd-megatron {__version__}")
        raise typer.Exit


@app.callback()
def _eaopd(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """The console script. The user's errors become one line on stderr and their exit code."""
    try:
        app(arguments, prog_name="eaopd")
    except Exception as raised:
        error = as_user_error(raised)
        if error is None:
            raise
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
