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

_BENCHMARKS = (
    "countdown, math500, aime24, aime25, amc23, minerva_math, olympiadbench; a .jsonl or .parquet file; "
    "hub:owner/name[:config][@revision]."
)


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def _option(text: str, *, show_default: bool | str = True, **options: Any) -> Any:
    return typer.Option(help=text, show_default=show_default, **options)


RecipeFile = Annotated[str, _argument("RECIPE", "The recipe's YAML file.")]
Overrides = Annotated[list[str] | None, _argument("a.b.c=value", "Values that replace the recipe's.")]


def expand_options(command: Callable[[Any], None]) -> Callable[..., None]:
    """Give a verb that takes a dataclass the signature of the dataclass, whose fields are annotated for typer."""
    (options,) = (kind for name, kind in get_type_hints(command).items() if name != "return")
    hints, signature = get_type_hints(options, include_extras=True), inspect.signature(options)

    def expanded(**values: Any) -> None:
        command(options(**values))

    parameters = [one.replace(annotation=hints[one.name]) for one in signature.parameters.values()]
    expanded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    expanded.__doc__, expanded.__annotations__ = command.__doc__, hints
    return expanded


@app.command("train", epilog="Example: eaopd train recipes/countdown/eopd.yaml run.folder=runs/mine seed=1")
def train_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    continue_from: Annotated[
        str | None, _option("Begin a new run with the student of this run or checkpoint.", metavar="RUN")
    ] = None,
) -> None:
    """Train the student. The same command resumes an interrupted run from its last checkpoint.

    Starts its own ranks on this host; under torchrun or srun it joins theirs.
    """
    from eaopd_megatron.launch.local_ranks import is_started_rank, launch_ranks, student_world_size

    overrides = overrides or []
    if continue_from is not None:
        overrides = [*overrides, f"run.continue_from={json.dumps(continue_from)}"]
    arguments = ["train", recipe, *overrides]
    if is_started_rank():
        _run_as_rank(arguments)
        return

    from eaopd_megatron.config import load_recipe
    from eaopd_megatron.models.supported import check_recipe_models
    from eaopd_megatron.training.run_folder import check_inputs, export_start, finished_message, started_from

    loaded = load_recipe(recipe, overrides)
    if finished := finished_message(loaded):
        print(finished)
        return
    export_start(loaded, print)
    loaded = started_from(loaded)
    check_recipe_models(loaded)
    check_inputs(loaded, hub=False)
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
    from eaopd_megatron.models.supported import check_local_model, check_recipe_context

    loaded = load_recipe(recipe, overrides or [])
    options = select_separate_teacher(loaded, teacher)
    check_recipe_context(loaded)
    check_local_model(options.model, options.parallel_layout, f"{teacher_key(teacher)}.model")
    raise typer.Exit(launch_ranks(arguments, teacher_world_size(options.parallel_layout)))


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """Parameters of `eaopd evaluate`."""

    model: Annotated[str, _argument("MODEL", "A Hugging Face folder or hub id, or a run's folder or checkpoint.")]
    more: Annotated[list[str] | None, _argument("BENCHMARK", "More benchmarks, as with --benchmarks.")] = None
    benchmarks: Annotated[list[str] | None, _option(_BENCHMARKS, metavar="NAME[,NAME]")] = None
    samples: Annotated[int, _option("Responses per problem.", min=1)] = 8
    problems: Annotated[int | None, _option("Only the first N problems.", min=1, show_default="all")] = None
    temperature: Annotated[float, _option("Sampling temperature; 0 is greedy.", min=0.0)] = 1.0
    top_p: Annotated[float, _option("Nucleus sampling.", min=0.0, max=1.0)] = 0.8
    max_response_tokens: Annotated[int, _option("Longest response, in tokens.", min=1)] = 8192
    seed: Annotated[int, _option("Seed of the local engine's sampling.", min=0)] = 1234
    template: Annotated[
        str | None,
        _option(
            "Template of the prompts.",
            metavar="chat|base|raw",
            show_default="chat if the tokenizer has a chat template, else raw",
        ),
    ] = None
    suffix: Annotated[
        str | None,
        _option("Line appended to each problem.", show_default="asks for a boxed answer; Countdown: no suffix"),
    ] = None
    fields: Annotated[str | None, _option("A file's fields for problem, answer and id.", metavar="NAME=FIELD,...")] = (
        None
    )
    engine: Annotated[
        str, _option("Generate on ranks of this host, or with SGLang servers.", metavar="local|sglang")
    ] = "local"
    tensor_parallel: Annotated[int, _option("Ranks, or GPUs of a server, per model.", min=1)] = 1
    batch_size: Annotated[int, _option("Sequences per local rank at a time.", min=1)] = 256
    servers: Annotated[
        int | None, _option("SGLang servers to start.", min=1, show_default="as many as the GPUs hold; 1 without")
    ] = None
    server_url: Annotated[list[str] | None, _option("A server that runs already.", metavar="URL")] = None
    api_key_file: Annotated[Path | None, _option("File with the servers' API key (mode 0600).")] = None
    max_concurrent_requests: Annotated[int, _option("Responses that a server generates at the same time.", min=1)] = 64
    max_running: Annotated[int | None, _option("", min=1, hidden=True)] = None  # old name, until 0.3
    out: Annotated[
        Path | None,
        _option("Output folder; an unfinished evaluation in it is resumed.", show_default="evaluations/MODEL"),
    ] = None
    regrade: Annotated[bool, typer.Option("--regrade", help="Only grade the folder's responses again.")] = False
    compare: Annotated[Path | None, _option("Also print the change from another evaluation.", metavar="FOLDER")] = None

    def request(self) -> EvaluationRequest:
        """Return the evaluation's request. Raises UserError for a value that no option takes."""
        from eaopd_megatron.config.schema import ServersConfig
        from eaopd_megatron.data.sources import FieldNames
        from eaopd_megatron.evaluation.evaluate import EvaluationRequest
        from eaopd_megatron.launch.local_ranks import replicas_that_fit

        if self.template:
            _check_choice("--template", self.template, "chat", "base", "raw")
        _check_choice("--engine", self.engine, "local", "sglang")
        lists = [*(self.benchmarks or []), *(self.more or [])]
        names = [name.strip() for part in lists for name in part.split(",") if name.strip()]
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(EvaluationRequest)}
        servers = ServersConfig(
            urls=self.server_url or [],
            count=self.servers or (replicas_that_fit(self.tensor_parallel) if self.engine == "sglang" else 1),
            tensor_parallel=self.tensor_parallel,
            max_concurrent_requests=self.max_running or self.max_concurrent_requests,
            api_key_file=str(self.api_key_file) if self.api_key_file and self.server_url else None,
        )
        fields = None if self.fields is None else FieldNames.parse(self.fields)
        options |= {"benchmarks": list(dict.fromkeys(names)), "fields": fields, "servers": servers}
        return EvaluationRequest(**options)


@app.command("evaluate", epilog="Example: eaopd evaluate runs/mine/student --benchmarks math500,aime24 --samples 8")
@expand_options
def evaluate_command(options: EvaluateOptions) -> None:
    """Score a model on benchmarks: avg@k, pass@k and majority vote, with confidence intervals."""
    if options.engine == "local" and not options.regrade and (Path(options.model) / "config.json").is_file():
        from eaopd_megatron.config.parallel import ParallelLayout
        from eaopd_megatron.models.supported import check_local_model

        check_local_model(options.model, ParallelLayout(options.tensor_parallel), "MODEL")  # before the slow imports
    from eaopd_megatron.evaluation.evaluate import run_evaluation

    if options.max_running is not None:
        print("warning: --max-running is now --max-concurrent-requests; the old name works until 0.3", file=sys.stderr)
    raise typer.Exit(run_evaluation(options.request(), regrade=options.regrade, compare=options.compare))


def _check_choice(option: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value}: expected {', '.join(allowed)}")


@app.command("report", epilog="Example: eaopd report runs/mine")
def report_command(
    run: Annotated[Path, _argument("RUN", "The run's folder.")],
    out: Annotated[
        Path | None, _option("Write the report here.", metavar="FOLDER", show_default="the run's folder")
    ] = None,
) -> None:
    """Write report.html, with its plots, into a run's folder, also while the run goes on."""
    from eaopd_megatron.reporting.run_report import write_run_report

    try:
        print(write_run_report(run, out))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; choose another folder with --out FOLDER") from None


@app.command("show", epilog="Example: eaopd show recipes/countdown/eopd.yaml seed=1 --explain optimizer.lr")
def show_command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    key: Annotated[str | None, _option("Print only the value of this key.", metavar="KEY")] = None,
    explain: Annotated[
        str | None,
        _option("Print what a key, or each key of a section, means, and where its value comes from.", metavar="KEY"),
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
        int | None, _option("Number of GPUs.", min=1, show_default="the recipe's, or one host of 8")
    ] = None,
    gpu: Annotated[str, _option("a100, h100, h200 or b200.", metavar="NAME")] = "h100",
    gpu_memory: Annotated[
        float | None, _option("Memory of a GPU, in GiB.", min=1.0, metavar="GIB", show_default="the GPU's")
    ] = None,
    teacher: Annotated[str | None, _option("Plan with another teacher.", metavar="MODEL")] = None,
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
    recipe: Annotated[str | None, _argument("RECIPE", "Also check its student and teachers.")] = None,
    overrides: Overrides = None,
) -> None:
    """Check versions, devices and backends of this machine. The exit code is 1 if something is missing or harmful.

    With a recipe, the servers of `servers.urls` are compared with this environment, its student generates a few
    responses, on ranks started for it, and its teachers score how they end; the exit code is 1 as well if student and
    teacher do not agree.
    """
    from eaopd_megatron.diagnostics.machine import check_machine, check_servers

    code = check_machine()
    if recipe is None:
        raise typer.Exit(code)
    from eaopd_megatron.config import load_recipe

    code = check_servers(load_recipe(recipe, overrides or [])) or code
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
