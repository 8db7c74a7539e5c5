"""The process of one rank of `eaopd train`, `teach`, `evaluate` or `doctor`, started by eaopd, torchrun or srun."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import select_separate_teacher
from eaopd_megatron.launch.entrypoint import must_complete, run_entrypoint
from eaopd_megatron.utils.gpu_environment import prepare_rank
from eaopd_megatron.utils.lifetime import die_with_parent
from eaopd_megatron.utils.log import log_rank0


def run_rank(arguments: Sequence[str]) -> int:
    """Run `train RECIPE [overrides]`, `teach RECIPE TEACHER [overrides]`, `eos-check RECIPE [overrides]` or
    `evaluate FILE` (options as JSON), report errors and return the exit code."""
    verb, target, *rest = arguments
    if verb == "train":
        return run_entrypoint(lambda: _train(load_recipe(target, rest)))
    if verb == "teach":
        return run_entrypoint(lambda: _teach(load_recipe(target, rest[1:]), rest[0]))
    if verb == "eos-check":
        return run_entrypoint(lambda: _eos_check(load_recipe(target, rest)))
    if verb == "evaluate":
        return run_entrypoint(lambda: _evaluate(Path(target)))
    raise ValueError(f"unknown verb {verb!r}")


def _train(recipe: Recipe) -> None:
    _prepare_student_rank(recipe)
    import torch

    from eaopd_megatron.distributed import parallel_state as groups
    from eaopd_megatron.distributed.heartbeat import dump_flight_recorder, enable_flight_recorder, heartbeat_monitor
    from eaopd_megatron.errors import ServiceUnavailable, StopRequested
    from eaopd_megatron.training.loop import train
    from eaopd_megatron.training.run_folder import RunFolder, export_start, finished_message, started_from
    from eaopd_megatron.training.trainer import Trainer

    export_start(recipe, log_rank0)
    recipe = started_from(recipe)
    if finished := finished_message(recipe):
        log_rank0(finished)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    collectives = RunFolder(Path(recipe.run.folder)).collectives
    enable_flight_recorder(collectives, recipe.distributed.flight_recorder)
    parallel, store = groups.init_distributed(
        recipe.student.parallel_layout, seed=recipe.seed, timeout_minutes=recipe.distributed.timeout_minutes
    )
    record = partial(dump_flight_recorder, collectives, parallel.rank)
    with heartbeat_monitor(store, parallel.rank, parallel.world_size, on_failure=record):
        trainer = Trainer(recipe, parallel)
        try:
            trainer.start()
            train(trainer)
            with must_complete():
                trainer.finish()
        except (StopRequested, ServiceUnavailable) as reason:
            trainer.save_and_stop(reason)
        finally:
            trainer.close()
    groups.shutdown_distributed()


def _prepare_student_rank(recipe: Recipe) -> None:
    """Set this rank's variables, before an import or a call looks for devices."""
    update_groups = recipe.rollout.engine == "sglang" and recipe.weight_sync.transport == "distributed"
    student = recipe.student
    prepare_rank(student.parallel_layout, precision=student.precision, update_groups=update_groups)


def _teach(recipe: Recipe, teacher: str) -> None:
    options = select_separate_teacher(recipe, teacher)
    prepare_rank(options.parallel_layout, precision=options.precision)
    import torch

    from eaopd_megatron.teacher.service.run import serve_teacher

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    serve_teacher(recipe, teacher)


def _eos_check(recipe: Recipe) -> None:
    _prepare_student_rank(recipe)
    from eaopd_megatron.diagnostics.eos_check_rank import eos_check_on_rank

    eos_check_on_rank(recipe)


def _evaluate(options: Path) -> None:
    work = json.loads(options.read_text())
    prepare_rank(ParallelLayout(work["tensor_parallel"]))
    from eaopd_megatron.evaluation.generate import generate_on_rank

    generate_on_rank(work)


if __name__ == "__main__":
    die_with_parent()
    code = run_rank(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # skip the destructors of process groups, in which a failed rank would wait for its peers
    os._exit(code)
