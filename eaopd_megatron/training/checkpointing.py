"""Save and resume the training state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from eaopd_megatron.checkpoint.dist_checkpoint import load_training_state, sharded_training_state
from eaopd_megatron.checkpoint.store import CheckpointStore, check_config_fingerprint, config_fingerprint
from eaopd_megatron.config import Recipe, dump_recipe, recipe_differences
from eaopd_megatron.config.aliases import at_resume
from eaopd_megatron.config.model_schema import AtResume
from eaopd_megatron.data.types import Prompt
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.training.components import Components
from eaopd_megatron.training.run_folder import RECIPE_FILE, RunFolder


class TrainingCheckpoints:
    """Saves weights and optimizer as Megatron shards, with the run's progress in state.json.

    Schedules, prompt cursor and random numbers have no other state: they are functions of (seed, iteration, updates).
    """

    def __init__(
        self, recipe: Recipe, parallel: ParallelState, folder: RunFolder, components: Components, prompts: list[Prompt]
    ) -> None:
        self.recipe, self.parallel, self.folder, self.components = recipe, parallel, folder, components
        self.changed: dict[str, float] = {}
        """Metrics of the first iteration after a resume: changed/KEY, the new value (1 where it is no number)."""
        self.optimizer = components.student.optimizer
        self.store = CheckpointStore(folder.checkpoints, recipe.run.keep_checkpoints, background=recipe.run.async_save)
        self.fingerprint = config_fingerprint(components.student_folder.config)
        self.prompts_digest = _digest(prompts)

    def save(self, iteration: int, updates: int) -> None:
        """Write the checkpoint of a completed iteration atomically, with run.async_save in the background."""
        state = {
            "iteration": iteration,
            "updates": updates,
            "seed": self.recipe.seed,
            "prompts": self.prompts_digest,
            "model": self.fingerprint,
            "layout": self._layout(),
        }
        self.store.save(
            iteration,
            sharded_training_state(self.components.model, self.optimizer),
            state,
            self._write_hf_files,
            self.parallel,
        )

    def resume(self, log: Callable[[str], None]) -> tuple[int, int]:
        """Load the newest checkpoint, saved at any layout, and return its (iteration, updates); (0, 0) without one.

        Raises UserError if the checkpoint is damaged (unless run.on_corrupt_checkpoint=fall_back and there is an
        earlier one), of another model, or was made with other prompts.
        """
        self.store.clean(self.parallel)
        path = self.store.latest_valid(
            self.parallel, fall_back=self.recipe.run.on_corrupt_checkpoint == "fall_back", log=log
        )
        if path is None:
            return 0, 0
        state = self.store.load_state(path)
        check_config_fingerprint(self.fingerprint, state["model"], path)
        if state["prompts"] != self.prompts_digest:
            raise UserError(f"{path}: made with other prompts than data.source={self.recipe.data.source} gives now")
        sharded = sharded_training_state(self.components.model, self.optimizer)
        load_training_state(
            self.components.model, self.optimizer, self.store.load_sharded(path, sharded, self.parallel)
        )
        layout = self._layout()
        changed = [name for name, size in layout.items() if state["layout"].get(name) != size]
        if changed:
            was, now = (", ".join(f"{name}={at.get(name)}" for name in changed) for at in (state["layout"], layout))
            log(f"{path.name} was saved at {was}; going on at {now}")
        self._log_changes(path, int(state["iteration"]), log)
        return int(state["iteration"]), int(state["updates"])

    def _log_changes(self, path: Path, iteration: int, log: Callable[[str], None]) -> None:
        before = self.folder.recipe_of(path)
        for key, old, new in recipe_differences(before, self.recipe) if before else ():
            if at_resume(key) is AtResume.LOGGED:
                log(f"{key} was {old}; it is {new} from iteration {iteration + 1} on")
                number = float(new) if isinstance(new, (int, float)) and math.isfinite(new) else 1.0
                self.changed[f"changed/{key}"] = number

    def _layout(self) -> dict[str, int | bool]:
        """Return how weights and optimizer are sharded now. A resumed run may change any of it."""
        sizes = {**asdict(self.parallel.layout), "data_parallel": self.parallel.dp_size}
        return sizes | {"optimizer.distributed": self.recipe.optimizer.distributed}

    def _write_hf_files(self, folder: Path) -> None:
        (folder / RECIPE_FILE).write_text(dump_recipe(self.recipe), encoding="utf-8")
        (folder / "hf").mkdir()
        self.components.student_folder.copy_config_and_tokenizer(folder / "hf")


def _digest(prompts: list[Prompt]) -> str:
    """Hash the prompts' ids, tokens and teachers, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.id}:{prompt.token_ids}{prompt.teacher}\n".encode())
    return digest.hexdigest()
