"""The command `eaopd`. Each verb imports what it needs when it is called, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from eaopd_megatron import __version__
from eaopd_megatron.errors import UserError
from eaopd_megatron.launch.entrypoint import as_user_error

if TYPE_CHECKING:
    from eaopd_megatron.evaluation.evaluate import EvaluationRequest

app = typer.Typer(
    help="On-policy distillation for Megatron-Core with the entropy-aware objective.",
    epilog="Start with: eaopd train recipes/countdown/eopd.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="a.b.c=value", help="Values that replace the recipe's.", show_default=False),
]


def expand_options(command: Callable[[Any], None]) -> Callable[..., None]:
    """Give a verb that takes one dataclass of options a signature with the dataclass's fields, for typer.

    The fields are annotated as typer's parameters are: `Annotated[int, typer.Option(...)] = 8`.
    """
    (options,) = (kind for name, kind in get_type_hints(command).items() if name != "return")
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(options)
    ]

    def expanded(**values: Any) -> None:
        command(options(**values))

    expanded.__doc__ = command.__doc__
    expanded.__annotations__ = hints
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return expanded


@app.command("train", epilog="Example: eaopd train recipes/countdown/eopd.yaml run.folder=runs/mine seed=1")
def train_command(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train the student. The same command resumes an interrupted run from its last checkpoint.

    Starts its own ranks on this host; under torchrun or srun it joins theirs.
    """
    from eaopd_megatron.launch.local_ranks import is_started_rank, launch_ranks, student_world_size

    arguments = ["train", recipe, *(overrides or [])]
    if is_started_rank():
        _run_as_rank(arguments)
        return

    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.models.supported import check_recipe_models
    from eaopd_megatron.training.run_folder import finished_message

    loaded = load_recipe(recipe, overrides or [])
    if finished := finished_message(loaded):
        print(finished)
        return
    check_recipe_models(loaded)
    logs = Path(loaded.run.folder) / "logs"
    raise typer.Exit(launch_ranks(arguments, student_world_size(loaded.student), log_folder=logs))


@app.command("teach", epilog="Example: eaopd teach my.yaml teacher.listen=0.0.0.0:8001 --teacher math")
def teach_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    teacher: Annotated[str, typer.Option(metavar="NAME", help="The teacher to serve, if the recipe has several.")] = "",
) -> None:
    """Serve the recipe's separate teacher over HTTP until SIGTERM.

    Starts its own ranks on this host; under torchrun or srun it joins theirs.
    """
    from eaopd_megatron.launch.local_ranks import is_started_rank, launch_ranks, teacher_world_size

    arguments = ["teach", recipe, teacher, *(overrides or [])]
    if is_started_rank():
        _run_as_rank(arguments)
        return

    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.config.schema import select_separate_teacher, teacher_key
    from eaopd_megatron.models.supported import check_local_model

    options = select_separate_teacher(load_recipe(recipe, overrides or []), teacher)
    check_local_model(options.model, options.parallel_layout, f"{teacher_key(teacher)}.model")
    raise typer.Exit(launch_ranks(arguments, teacher_world_size(options.parallel_layout)))


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Parameters of `eaopd evaluate`."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder or hub id, a run's folder or one of its checkpoints.",
            show_default=False,
        ),
    ]
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="BENCHMARK", help="More benchmarks, as with --benchmarks.", show_default=False),
    ] = None
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="countdown, math500, aime24, aime25, amc23, minerva_math, olympiadbench; a .jsonl or .parquet file; "
            "hub:owner/name[:config][@revision].",
            show_default=False,
        ),
    ] = None
    samples: Annotated[int, typer.Option(min=1, help="Responses per problem.")] = 8
    problems: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.", show_default="all")] = None
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 1.0
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.8
    max_response_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 8192
    seed: Annotated[int, typer.Option(min=0, help="Seed of the local engine's sampling.")] = 1234
    template: Annotated[
        str | None,
        typer.Option(
            metavar="chat|base|raw",
            help="Template of the prompts.",
            show_default="chat if the tokenizer has a chat template, else raw",
        ),
    ] = None
    suffix: Annotated[
        str | None,
        typer.Option(
            help="Line appended to each problem.", show_default="asks for a boxed answer; Countdown: no suffix"
        ),
    ] = None
    fields: Annotated[
        str | None,
        typer.Option(metavar="NAME=FIELD,...", help="A file's fields for problem, answer and id.", show_default=False),
    ] = None
    engine: Annotated[
        str, typer.Option(metavar="local|sglang", help="Generate on ranks of this host, or with SGLang servers.")
    ] = "local"
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks, or GPUs of a server, per model.")] = 1
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences that a local rank generates together.")] = 256
    servers: Annotated[int, typer.Option(min=1, help="SGLang servers to start.")] = 1
    server_url: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="A server that runs already.", show_default=False)
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the servers' API key (mode 0600).", show_default=False)
    ] = None
    max_concurrent_requests: Annotated[
        int, typer.Option(min=1, help="Responses that a server generates at the same time.")
    ] = 64
    max_running: Annotated[int | None, typer.Option(min=1, hidden=True)] = None  # old name, until 0.3
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder; an unfinished evaluation in it is resumed.", show_default="evaluations/MODEL"
        ),
    ] = None
    regrade: Annotated[
        bool, typer.Option("--regrade", help="Grade the folder's responses again; generate nothing.")
    ] = False
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also print the change from another evaluation.", show_default=False),
    ] = None

    def request(self) -> EvaluationRequest:
        """Return the evaluation's request. Raises UserError for a value that no option takes."""
        from eaopd_megatron.data.sources import FieldNames
        from eaopd_megatron.evaluation.evaluate import EvaluationRequest
        from eaopd_megatron.evaluation.generate import ServerChoice

        if self.template:
            _check_choice("--template", self.template, "chat", "base", "raw")
        _check_choice("--engine", self.engine, "local", "sglang")
        lists = [*(self.benchmarks or []), *(self.more or [])]
        names = [name.strip() for part in lists for name in part.split(",") if name.strip()]
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(EvaluationRequest)}
        servers = ServerChoice(
            tuple(self.server_url or ()),
            self.servers,
            self.tensor_parallel,
            self.max_running or self.max_concurrent_requests,
            api_key_file=self.api_key_file,
        )
        return EvaluationRequest(
            **{
                **options,
                "benchmarks": list(dict.fromkeys(names)),
                "fields": None if self.fields is None else FieldNames.parse(self.fields),
                "servers": servers,
            }
        )


@app.command("evaluate", epilog="Example: eaopd evaluate runs/mine/student --benchmarks math500,aime24 --samples 8")
@expand_options
def evaluate_command(options: EvaluateOptions) -> None:
    """Score a model on benchmarks: avg@k, pass@k and majority vote, with confidence intervals."""
    from eaopd_megatron.evaluation.evaluate import run_evaluation

    if options.max_running is not None:
        print("warning: --max-running is now --max-concurrent-requests; the old name works until 0.3", file=sys.stderr)
    raise typer.Exit(run_evaluation(options.request(), regrade=options.regrade, compare=options.compare))


def _check_choice(option: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value}: expected {', '.join(allowed)}")


@app.command("report", epilog="Example: eaopd report runs/mine")
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)],
) -> None:
    """Write report.html, with its plots, into a run's folder, also while the run goes on."""
    from eaopd_megatron.reporting.run_report import write_run_report

    print(write_run_report(run))


@app.command("show", epilog="Example: eaopd show recipes/countdown/eopd.yaml seed=1 --explain optimizer.lr")
def show_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Print only the value of this key.", show_default=False)
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Print what a key, or each key of a section, means, and where its value comes from.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the recipe as it would run, with its bases, overrides and defaults. recipes/README.md lists all keys."""
    from eaopd_megatron.config import dump_recipe, recipe_value
    from eaopd_megatron.config.loader import load_with_origins

    loaded, origins = load_with_origins(recipe, overrides or [])
    if explain is not None:
        from eaopd_megatron.config.recipe_reference import explain_key

        print(explain_key(loaded, origins, explain))
    elif key is None:
        print(dump_recipe(loaded), end="")
    else:
        value = recipe_value(loaded, key)
        print(value if isinstance(value, str) else json.dumps(value))


@app.command("plan", epilog="Example: eaopd plan recipes/qwen3/4b_from_32b.yaml --gpus 8 --gpu h200")
def plan_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs.", show_default="the recipe's, or one host of 8")
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="Kind of GPU: a100, h100, h200 or b200.")] = "h100",
    gpu_memory: Annotated[
        float | None, typer.Option(min=1.0, metavar="GIB", help="Memory of a GPU, in GiB.", show_default="the GPU's")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Plan with another teacher.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a file.", show_default=False)
    ] = None,
) -> None:
    """Estimate memory, traffic and time before a run, and list the layouts that fit.

    The exit code is 1 if the recipe's own layout does not fit.
    """
    from eaopd_megatron.planning.plan_report import plan_recipe

    plan_recipe(recipe, overrides or [], gpus=gpus, gpu=gpu, gpu_memory=gpu_memory, teacher=teacher, out=out)


@app.command("doctor", epilog="Example: eaopd doctor recipes/countdown/eopd.yaml")
def doctor_command(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="Also check its student and teachers.", show_default=False),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, devices and backends of this machine. The exit code is 1 if something is missing or harmful.

    With a recipe, its student also generates a few responses, on ranks started for it, and its teachers score how they
    end; the exit code is 1 as well if student and teacher do not agree.
    """
    from eaopd_megatron.diagnostics.machine import check_machine

    code = check_machine()
    if recipe is None:
        raise typer.Exit(code)
    from eaopd_megatron.diagnostics.eos_check import check_eos

    raise typer.Exit(check_eos(recipe, overrides or []) or code)


def _run_as_rank(arguments: list[str]) -> None:
    """Run this process as the rank that torchrun or srun started."""
    from eaopd_megatron import worker
    from eaopd_megatron.launch.local_ranks import rank_environment

    os.environ.update(rank_environment())
    if code := worker.run_rank(arguments):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a failed rank must not wait for the others in the destructors of its process groups


def _print_version(requested: bool) -> None:
    if requested:
        print(f"eaopd-megatron {__version__}")
        raise typer.Exit


@app.callback()
def _eaopd(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A user's error becomes one line on stderr and its exit code."""
    try:
        app(arguments, prog_name="eaopd")
    except Exception as raised:
        error = as_user_error(raised)
        if error is None:
            raise
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
