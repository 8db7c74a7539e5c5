"""One rank: what `eaopd train` and `eaopd evaluate` start N times, or what torchrun or srun started."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.launch import die_with_parent


def main(arguments: Sequence[str]) -> int:
    """`train RECIPE [overrides]` or `evaluate FILE` (the options as JSON). Returns the exit code; errors are reported
    here."""
    verb, target, *rest = arguments
    if verb == "train":
        return _guarded(lambda: _train(load_recipe(target, rest)))
    if verb == "evaluate":
        from eaopd_megatron.evaluation.command import evaluate_on_rank

        return _guarded(lambda: evaluate_on_rank(json.loads(Path(target).read_text())))
    raise ValueError(f"unknown verb {verb!r}")


def _train(recipe: Recipe) -> None:
    import torch

    from eaopd_megatron.training.folder import already_finished

    if finished := already_finished(recipe):
        if os.environ["RANK"] == "0":
            print(finished)
        return

    from eaopd_megatron.megatron import groups
    from eaopd_megatron.training.ending import finish
    from eaopd_megatron.training.loop import train
    from eaopd_megatron.training.run import Run
    from eaopd_megatron.training.watch import watched

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    layout = groups.Layout(recipe.student.tensor_parallel, recipe.student.sequence_parallel)
    parallel, store = groups.start(layout, seed=recipe.seed, timeout_minutes=recipe.distributed.timeout_minutes)
    with watched(store, parallel.rank, parallel.world_size):
        run = Run(recipe, parallel)
        try:
            train(run)
            finish(run)
        finally:
            run.close()
    groups.stop()


def _guarded(work: Callable[[], None]) -> int:
    """Run, and report an error: to the launcher through $EAOPD_ERROR_FILE.<rank>, to the user where there is no
    launcher."""
    _quieten()
    rank = int(os.environ.get("RANK", "0"))
    try:
        work()
        return 0
    except SystemExit as stop:  # a signal, and the state is saved
        return int(stop.code or 0)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename:  # a full disk, a folder without permission
            error = UserError(f"{error.filename}: {error.strerror}")
        user = isinstance(error, UserError)
        code = error.exit_code if isinstance(error, UserError) else 1
        message = str(error) if user else f"{type(error).__name__}: {error}"
        if not user:
            traceback.print_exc()
        _report(rank, message, code, user)
        return code


def _report(rank: int, message: str, code: int, user: bool) -> None:
    base = os.environ.get("EAOPD_ERROR_FILE")
    if base is None:
        print(f"error: {message}" if user else f"error: rank {rank}: {message}", file=sys.stderr, flush=True)
        return
    record = {"message": message, "exit_code": code, "rank": rank, "user": user, "time": time.time()}
    path = Path(f"{base}.{rank}")
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(path)


def _quieten() -> None:
    """Megatron-Core warns of every optional package at import; what matters of that is in `eaopd doctor`."""
    for text in (".*Transformer Engine.*", ".*Apex.*", ".*transformer_engine.*", ".*not installed.*"):
        warnings.filterwarnings("ignore", message=text)
    warnings.filterwarnings("ignore", module="megatron.*")
    logging.getLogger("megatron").setLevel(logging.ERROR)


if __name__ == "__main__":
    die_with_parent()
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # a failed rank must not wait for its peers in the destructors of their process groups
    os._exit(code)
