"""The checkpoints of a run: written atomically, verified before use, the newest few retained.

    checkpoints/step_000050/sharded/        weights and optimizer (see dist_checkpoint.py)
                            hf/             config.json and tokenizer, needed for an export
                            state.json      iteration, updates and the like
                            manifest.json   size and SHA-256 of every other file

A checkpoint is written as `step_000050.incomplete` and renamed once all its files are synced.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from eaopd_megatron.checkpoint.dist_checkpoint import (
    StagedState,
    load_sharded,
    stage_sharded,
    write_staged,
)
from eaopd_megatron.distributed.collective_errors import run_on_main_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.utils.files import checkpoint_step, complete_checkpoints, publish_directory
from eaopd_megatron.utils.lifetime import call_in_thread


class AsyncSaver:
    """Runs one task at a time on a daemon thread. `start` and `wait` raise the error of the task before."""

    def __init__(self) -> None:
        self._task: concurrent.futures.Future[object] | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the previous task, then start `work`."""
        self.wait()
        self._task = call_in_thread(work, "checkpoint")

    def wait(self) -> None:
        """Wait for the running task, if any, and raise its error."""
        if self._task is not None:
            concurrent.futures.wait([self._task])  # if interrupted, the next save still waits for the buffers
            task, self._task = self._task, None
            task.result()


_SHARDED, _STATE, _MANIFEST = "sharded", "state.json", "manifest.json"
_INCOMPLETE, _REPLACED, _REMOVED, _DAMAGED = ".incomplete", ".replaced", ".removed", ".damaged"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointStore:
    """The checkpoint folder of a run, which retains the newest `keep` checkpoints (at least one).

    background: `save` returns as soon as the shards are copied to host memory; a thread writes them and runs its
    collectives over a gloo group of its own. Call `wait` before the process ends.
    """

    def __init__(self, folder: Path, keep: int, *, background: bool = False) -> None:
        self.folder, self.keep = Path(folder), max(1, keep)
        self._saver = AsyncSaver() if background else None
        # reuses its host buffers at every later save
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True) if background else None
        self._group: dist.ProcessGroup | None = None

    def completed(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return complete_checkpoints(self.folder)

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return next(reversed(self.completed()), None)

    def clean(self, parallel: ParallelState) -> None:
        """Remove what a killed run left unfinished. Called at the start of a run. Collective."""
        run_on_main_or_raise(parallel, self._clean)

    def save(
        self,
        step: int,
        sharded_state: dict[str, Any],
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None] | None,
        parallel: ParallelState,
    ) -> Path:
        """Write the checkpoint of `step` and return its folder, which appears when it is complete. Collective.

        state: JSON values. extra_files: called on the main rank with the folder that becomes `step_XXXXXX`, to add
        `hf/`. Raises UserError on every rank if any rank cannot write; earlier checkpoints stay intact. A background
        save raises it from the next `save` or `wait`, and waits for the save before it.
        """
        self.wait()  # the stager's buffers are free again
        final = self.folder / f"step_{step:06d}"
        staged = stage_sharded(sharded_state, parallel, self._stager)
        if self._saver is None:
            self._write(final, staged, state, extra_files, parallel)
        else:
            if self._group is None and parallel.world_size > 1:
                self._group = dist.new_group(backend="gloo")
            self._saver.start(lambda: self._write(final, staged, state, extra_files, parallel))
        return final

    def wait(self) -> None:
        """Wait until the last `save` is on disk. Raises UserError if it failed."""
        if self._saver is not None:
            self._saver.wait()

    def _write(
        self,
        final: Path,
        staged: StagedState,
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None] | None,
        parallel: ParallelState,
    ) -> None:
        on_main = partial(run_on_main_or_raise, parallel, group=self._group)
        work = final.with_name(final.name + _INCOMPLETE)
        before = self.latest()
        try:
            on_main(partial(_make_empty, work))
            write_staged(work / _SHARDED, staged, parallel, self._group)
            on_main(partial(_complete, work, final, state, extra_files))
        except BaseException as error:
            if parallel.is_main:
                shutil.rmtree(work, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            earlier = f"the last good checkpoint is {before}" if before else "there is no earlier checkpoint"
            why = f"disk full while saving {final}" if error.errno in _DISK_FULL else f"cannot save {final}: {error}"
            raise UserError(f"{why}; {earlier}") from error
        on_main(self._remove_old)

    def latest_valid(
        self, parallel: ParallelState, *, fall_back: bool = False, log: Callable[[str], None] = print
    ) -> Path | None:
        """Return the newest checkpoint after verifying it, or None if there is no checkpoint. Collective.

        Raises UserError on every rank if it is damaged. fall_back: rename a damaged checkpoint to
        `step_XXXXXX.damaged`, log a line, and try the one before it, if there is one.
        """
        newest_first = self.completed()[::-1]  # list once: the main rank renames folders below
        for path, older in pairwise([*newest_first, None]):
            assert path is not None
            try:
                run_on_main_or_raise(parallel, partial(self.verify, path))
                return path
            except UserError as error:
                if not fall_back or older is None:
                    raise
                aside = path.with_name(path.name + _DAMAGED)
                run_on_main_or_raise(parallel, partial(_replace, path, aside))
                log(f"{str(error).partition(';')[0]}; it is now {aside.name}: falling back to {older}")
        return None

    def load_sharded(self, path: Path, sharded_state: dict[str, Any], parallel: ParallelState) -> dict[str, Any]:
        """Read the shards that `sharded_state` names. Collective. Raises UserError on every rank."""
        return load_sharded(path / _SHARDED, sharded_state, parallel)

    @staticmethod
    def load_state(path: Path) -> dict[str, Any]:
        """Return the `state` that was passed to `save`."""
        try:
            return dict(json.loads((path / _STATE).read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{path / _STATE}: cannot be read: {error}") from error

    @staticmethod
    def verify(path: Path) -> None:
        """Compare a checkpoint's files with its manifest. Raises UserError naming the first damaged file."""
        try:
            files = json.loads((path / _MANIFEST).read_text())["files"]
            expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        except FileNotFoundError:
            raise UserError(f"{path}: no checkpoint ({_MANIFEST} is missing)") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(_damaged(path, _MANIFEST, f"cannot be read: {error}")) from error
        for name, (size, _) in expected.items():
            if not (path / name).is_file():
                raise UserError(_damaged(path, name, "is missing"))
            actual = (path / name).stat().st_size
            if actual != size:
                raise UserError(_damaged(path, name, f"has {actual} bytes, {size} were written"))
        try:
            digests = _digests(path, list(expected))
        except OSError as error:
            raise UserError(_damaged(path, Path(error.filename).name, f"cannot be read: {error.strerror}")) from error
        for name, (_, digest) in expected.items():
            if digests[name] != digest:
                raise UserError(_damaged(path, name, "has other contents than were written"))

    def _clean(self) -> None:
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            name, dot, kind = path.name.partition(".")
            if checkpoint_step(name) is None or dot + kind not in (_INCOMPLETE, _REPLACED, _REMOVED):
                continue
            if dot + kind == _REPLACED and not path.with_name(name).exists():
                path.rename(path.with_name(name))  # killed between the two renames of `publish_directory`
            else:
                shutil.rmtree(path)

    def _remove_old(self) -> None:
        for path in self.completed()[: -self.keep]:
            removed = path.with_name(path.name + _REMOVED)  # a half-removed checkpoint must not look complete
            try:
                path.rename(removed)
                shutil.rmtree(removed)
            except OSError as error:
                raise UserError(f"cannot remove the old checkpoint {path}: {error}") from error


_FINGERPRINT = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "num_experts", "moe_intermediate_size", "vocab_size", "tie_word_embeddings"),
)


def config_fingerprint(hf_config: Any) -> dict[str, Any]:
    """Return the parts of a Hugging Face configuration that determine which weights fit it."""
    architecture = (hf_config.architectures or ["none"])[0]
    return {"architecture": architecture, **{name: getattr(hf_config, name, None) for name in _FINGERPRINT}}


def check_config_fingerprint(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Raise UserError with the first difference if the checkpoint at `path` belongs to another model.

    expected: fingerprint of the recipe's student. found: fingerprint in the checkpoint.
    """
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: a checkpoint of another model: its {name} is {found.get(name)}, "
                f"the recipe's student has {value}; choose another run.folder or the student it was trained from"
            )


def _make_empty(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)
    (work / _SHARDED).mkdir(parents=True)


def _replace(path: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)


def _complete(work: Path, final: Path, state: Mapping[str, Any], extra_files: Callable[[Path], None] | None) -> None:
    """Write the main rank's files, sync everything, and rename the checkpoint to its final name."""
    (work / _STATE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n")
    if extra_files is not None:
        extra_files(work)
    names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    digests = _digests(work, names)
    files = {name: {"bytes": (work / name).stat().st_size, "sha256": digests[name]} for name in names}
    (work / _MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    publish_directory(work, final, final.with_name(final.name + _REPLACED))


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))


def _damaged(path: Path, name: str, what: str) -> str:
    remedy = f"remove {path}, or set run.on_corrupt_checkpoint=fall_back, to continue from the one before it"
    return f"damaged checkpoint: {path / name} {what}; {remedy}"
