"""One rank: what `eaopd train`, `eaopd teach` and `eaopd evaluate` start N times, or what torchrun or srun started."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.launch.entrypoint import guarded
from eaopd_megatron.utils.lifetime import die_with_parent
from eaopd_megatron.utils.log import log_rank0


def main(arguments: Sequence[str]) -> int:
    """`train RECIPE [overrides]`, `teach RECIPE TEACHER [overrides]`, `agreement RECIPE [overrides]` or `evaluate FILE`
    (its options as JSON). The exit code; errors are reported."""
    verb, target, *rest = arguments
    if verb == "train":
        return guarded(lambda: _train(load_recipe(target, rest)))
    if verb == "teach":
        return guarded(lambda: _teach(load_recipe(target, rest[1:]), rest[0]))
    if verb == "agreement":
        return guarded(lambda: _agreement(load_recipe(target, rest)))
    if verb == "evaluate":
        return guarded(lambda: _evaluate(Path(target)))
    raise ValueError(f"unknown verb {verb!r}")


def _train(recipe: Recipe) -> None:
    import torch

    from eaopd_megatron.distributed import flight_recorder
    from eaopd_megatron.distributed import parallel_state as groups
    from eaopd_megatron.distributed.heartbeat import watched
    from eaopd_megatron.errors import Asked, ServiceFailed
    from eaopd_megatron.training.ending import finish
    from eaopd_megatron.training.loop import train
    from eaopd_megatron.training.run_folder import RunFolder, already_finished
    from eaopd_megatron.training.trainer import Run

    if finished := already_finished(recipe):
        log_rank0(finished)
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    collectives = RunFolder(Path(recipe.run.folder)).collectives
    flight_recorder.record(collectives, recipe.distributed.flight_recorder)
    parallel, store = groups.start(
        recipe.student.parallel_layout, seed=recipe.seed, timeout_minutes=recipe.distributed.timeout_minutes
    )
    record = partial(flight_recorder.dump, collectives, parallel.rank)
    with watched(store, parallel.rank, parallel.world_size, on_failure=record):
        run = Run(recipe, parallel)
        try:
            run.open()
            train(run)
            finish(run)
        except (Asked, ServiceFailed) as reason:
            run.stop_early(reason)
        finally:
            run.close()
    groups.stop()


def _teach(recipe: Recipe, teacher: str) -> None:
    import torch

    from eaopd_megatron.teacher.service.run import teach

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    teach(recipe, teacher)


def _agreement(recipe: Recipe) -> None:
    from eaopd_megatron.diagnostics.eos_trial import agreement_on_rank

    agreement_on_rank(recipe)


def _evaluate(options: Path) -> None:
    from eaopd_megatron.evaluation.generate import generate_on_rank

    generate_on_rank(json.loads(options.read_text()))


if __name__ == "__main__":
    die_with_parent()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # a failed rank must not wait for its peers in the destructors of their process groups
    os._exit(code)
