"""A run's checkpoints: each is whole or not there, the newest few are kept, and a damaged one is refused.

    checkpoints/step_000050/sharded/        weights and optimiser (`distributed`)
                            hf/             config.json, tokenizer: what an export needs
                            state.json      where the run stood
                            manifest.json   bytes and SHA-256 of every other file

A checkpoint is written as `step_000050.incomplete` and renamed when all its files are on the disk.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.distributed as dist

from eaopd_megatron.checkpoint.dist_checkpoint import StagedState, load_sharded, stage_sharded, write_staged
from eaopd_megatron.distributed.collective_errors import run_on_all_or_raise
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.utils.files import fsync_path


class AsyncSaver:
    """One piece of work at a time. Its error is raised where it is waited for, and nowhere else.

    The thread does not keep a process alive that ends for another reason.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin the work, once the work before it has ended (whose error it raises)."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the work, if there is any, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error


_SHARDED, _STATE, _MANIFEST = "sharded", "state.json", "manifest.json"
_INCOMPLETE, _REPLACED, _REMOVED, _DAMAGED = ".incomplete", ".replaced", ".removed", ".damaged"
_COMPLETE = re.compile(r"step_(\d{6,})")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointStore:
    """The folder of a run's checkpoints. The newest `keep` are kept (at least one).

    background: `save` returns when it has a copy in host memory, and a thread writes; its collectives go over a gloo
    group of their own. Then `wait` must be called before the process ends.
    """

    def __init__(self, folder: Path, keep: int, *, background: bool = False) -> None:
        self.folder, self.keep = Path(folder), max(1, keep)
        self._background = AsyncSaver() if background else None
        self._group: dist.ProcessGroup | None = None

    def completed(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.completed()), None)

    def clean(self, parallel: ParallelState) -> None:
        """At the start of a run: remove what a killed run left unfinished. Collective."""
        _on_main(parallel, self._clean)

    def save(
        self,
        step: int,
        sharded_state: dict[str, Any],
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None] | None,
        parallel: ParallelState,
    ) -> Path:
        """Write the checkpoint of `step` and return its folder, which appears when it is complete. Collective.

        state: JSON values. extra_files: called on the main rank with the folder that becomes `step_XXXXXX`, to write
        `hf/` into it. Raises UserError on every rank when any rank cannot write; the checkpoints that were there stay.
        In the background that is raised by the next `save` or `wait`; a save waits for the one before it.
        """
        self.wait()
        final = self.folder / f"step_{step:06d}"
        prepared = stage_sharded(sharded_state, parallel, copy=self._background is not None)
        if self._background is None:
            self._write(final, prepared, state, extra_files, parallel)
        else:
            if self._group is None and parallel.world_size > 1:
                self._group = dist.new_group(backend="gloo")
            self._background.start(lambda: self._write(final, prepared, state, extra_files, parallel))
        return final

    def wait(self) -> None:
        """Wait until what `save` began is on the disk; raises what `save` would have raised."""
        if self._background is not None:
            self._background.wait()

    def _write(
        self,
        final: Path,
        prepared: StagedState,
        state: Mapping[str, Any],
        extra_files: Callable[[Path], None] | None,
        parallel: ParallelState,
    ) -> None:
        on_main = partial(_on_main, parallel, group=self._group)
        work = final.with_name(final.name + _INCOMPLETE)
        before = self.latest()
        try:
            on_main(partial(_make_empty, work))
            write_staged(work / _SHARDED, prepared, parallel, self._group)
            on_main(partial(_complete, work, final, state, extra_files))
        except BaseException as error:
            if parallel.is_main:
                shutil.rmtree(work, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            kept = f"the last good checkpoint is {before}" if before else "there is no earlier checkpoint"
            why = f"disk full while saving {final}" if error.errno in _DISK_FULL else f"cannot save {final}: {error}"
            raise UserError(f"{why}; {kept}") from error
        on_main(self._remove_old)

    def latest_valid(
        self, parallel: ParallelState, *, fall_back: bool = False, log: Callable[[str], None] = print
    ) -> Path | None:
        """The newest checkpoint, verified; None where there is none. Collective.

        Raises UserError on every rank where it is damaged. fall_back: it is set aside as `step_XXXXXX.damaged`, `say`
        is told, and the one before it is tried, as long as there is one.
        """
        newest_first = self.completed()[::-1]  # read once: the main rank renames while others would read again
        for path, older in pairwise([*newest_first, None]):
            assert path is not None
            try:
                _on_main(parallel, partial(self.verify, path))
                return path
            except UserError as error:
                if not fall_back or older is None:
                    raise
                aside = path.with_name(path.name + _DAMAGED)
                _on_main(parallel, partial(_replace, path, aside))
                log(f"{str(error).partition(';')[0]}; it is now {aside.name}: falling back to {older}")
        return None

    def load_sharded(self, path: Path, sharded_state: dict[str, Any], parallel: ParallelState) -> dict[str, Any]:
        """Read what `sharded_state` asks for. Collective; UserError on every rank."""
        return load_sharded(path / _SHARDED, sharded_state, parallel)

    @staticmethod
    def load_state(path: Path) -> dict[str, Any]:
        """The `state` that a checkpoint was saved with."""
        try:
            return dict(json.loads((path / _STATE).read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{path / _STATE}: cannot be read: {error}") from error

    @staticmethod
    def verify(path: Path) -> None:
        """Compare a checkpoint's files with its manifest. Raises UserError with the name of the first damaged file."""
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
            found = (path / name).stat().st_size
            if found != size:
                raise UserError(_damaged(path, name, f"has {found} bytes, {size} were written"))
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
            if not _COMPLETE.fullmatch(name) or dot + kind not in (_INCOMPLETE, _REPLACED, _REMOVED):
                continue
            if dot + kind == _REPLACED and not path.with_name(name).exists():
                path.rename(path.with_name(name))  # killed between the two renames of `_complete`
            else:
                shutil.rmtree(path)

    def _remove_old(self) -> None:
        for path in self.completed()[: -self.keep]:
            removed = path.with_name(path.name + _REMOVED)  # first: a half-removed checkpoint must not look complete
            try:
                path.rename(removed)
                shutil.rmtree(removed)
            except OSError as error:
                raise UserError(f"cannot remove the old checkpoint {path}: {error}") from error


_FINGERPRINT = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "num_experts",
    "moe_intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)


def config_fingerprint(hf_config: Any) -> dict[str, Any]:
    """What of a Hugging Face configuration decides which weights fit it."""
    architecture = (hf_config.architectures or ["none"])[0]
    return {"architecture": architecture, **{name: getattr(hf_config, name, None) for name in _FINGERPRINT}}


def check_config_fingerprint(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint (its fingerprint: found) of another model than the recipe's (UserError, first difference)."""
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: a checkpoint of another model: its {name} is {found.get(name)}, "
                f"the recipe's student has {value}; choose another run.folder or the student it was trained from"
            )


def _on_main(parallel: ParallelState, work: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Work of the main rank, which the others wait for. Collective."""
    run_on_all_or_raise(parallel, lambda: work() if parallel.is_main else None, group)


def _make_empty(work: Path) -> None:
    if work.exists():
        shutil.rmtree(work)
    (work / _SHARDED).mkdir(parents=True)


def _replace(path: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    path.rename(target)


def _complete(work: Path, final: Path, state: Mapping[str, Any], extra_files: Callable[[Path], None] | None) -> None:
    """Write what the main rank adds, bring everything to the disk, and let the checkpoint appear."""
    (work / _STATE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n")
    if extra_files is not None:
        extra_files(work)
    names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file())
    digests = _digests(work, names)
    files = {name: {"bytes": (work / name).stat().st_size, "sha256": digests[name]} for name in names}
    (work / _MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    for path in [*work.rglob("*"), work]:
        fsync_path(path)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    work.rename(final)
    fsync_path(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _digests(folder: Path, names: list[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(names, threads.map(digest, names), strict=True))


def _damaged(path: Path, name: str, what: str) -> str:
    remedy = f"remove {path}, or set run.on_corrupt_checkpoint=fall_back, to continue from the one before it"
    return f"damaged checkpoint: {path / name} {what}; {remedy}"
