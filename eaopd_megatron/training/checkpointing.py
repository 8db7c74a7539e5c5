"""What a training checkpoint holds, and how a run takes its place from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from eaopd_megatron.checkpoint.dist_checkpoint import load_training_state, sharded_training_state
from eaopd_megatron.checkpoint.store import CheckpointStore, check_config_fingerprint, config_fingerprint
from eaopd_megatron.config import Recipe
from eaopd_megatron.data.types import Prompt
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.training.components import Components
from eaopd_megatron.training.run_folder import RunFolder


class TrainingCheckpoints:
    """Weights and optimiser as Megatron shards; beside them how far the run is.

    Schedule, prompt cursor and random numbers are functions of (seed, iteration, updates): those numbers are their
    whole state.
    """

    def __init__(
        self, recipe: Recipe, parallel: ParallelState, folder: RunFolder, components: Components, prompts: list[Prompt]
    ) -> None:
        self.recipe, self.parallel, self.components = recipe, parallel, components
        self.optimizer = components.student.optimizer
        self.store = CheckpointStore(folder.checkpoints, recipe.run.keep_checkpoints, background=recipe.run.async_save)
        self.fingerprint = config_fingerprint(components.student_folder.config)
        self.prompts = _digest(prompts)

    def save(self, iteration: int, updates: int) -> None:
        """Write the checkpoint of a completed iteration, whole or not at all; with run.async_save on a thread."""
        state = {
            "iteration": iteration,
            "updates": updates,
            "seed": self.recipe.seed,
            "prompts": self.prompts,
            "model": self.fingerprint,
            "layout": self._layout(),
        }
        self.store.save(
            iteration,
            sharded_training_state(self.components.model, self.optimizer),
            state,
            self._companions,
            self.parallel,
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. UserError where it could not be written."""
        self.store.wait()

    def resume(self, log: Callable[[str], None]) -> tuple[int, int]:
        """(iteration, updates) completed in the newest checkpoint, whose weights and optimiser are loaded; (0, 0)
        without one. Any layout goes on from any other's.

        Raises UserError for a checkpoint that is damaged (unless run.on_corrupt_checkpoint is fall_back), of another
        model, or made with other prompts.
        """
        self.store.clean(self.parallel)
        path = self.store.latest_valid(
            self.parallel, fall_back=self.recipe.run.on_corrupt_checkpoint == "fall_back", log=log
        )
        if path is None:
            return 0, 0
        state = self.store.load_state(path)
        check_config_fingerprint(self.fingerprint, state["model"], path)
        if state["prompts"] != self.prompts:
            raise UserError(f"{path}: made with other prompts than data.source={self.recipe.data.source} gives now")
        wanted = sharded_training_state(self.components.model, self.optimizer, loading=True)
        load_training_state(self.components.model, self.optimizer, self.store.load_sharded(path, wanted, self.parallel))
        here = self._layout()
        changed = [name for name, size in here.items() if state["layout"].get(name) != size]
        if changed:
            was, now = (", ".join(f"{name}={at.get(name)}" for name in changed) for at in (state["layout"], here))
            log(f"{path.name} was saved at {was}; going on at {now}")
        return int(state["iteration"]), int(state["updates"])

    def _layout(self) -> dict[str, int | bool]:
        """How weights and optimiser are cut now; none of it need be the same when the run goes on."""
        sizes = {**asdict(self.parallel.layout), "data_parallel": self.parallel.dp_size}
        return sizes | {"optimizer.distributed": self.recipe.optimizer.distributed}

    def _companions(self, folder: Path) -> None:
        (folder / "hf").mkdir()
        self.components.student_folder.copy_config_and_tokenizer(folder / "hf")


def _digest(prompts: list[Prompt]) -> str:
    """A hash of the prompts' ids, tokens and teachers, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}:{prompt.token_ids}{prompt.teacher}\n".encode())
    return digest.hexdigest()
