"""Files and folders that a reader or a crash finds complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError


def read_json(path: Path, label: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises UserError, starting with `label`, that names the file and the fault."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{label}: {path.name} is missing") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{label}: {path.name} is no JSON: line {error.lineno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label}: {path.name} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{label}: {path.name} holds no JSON object")
    return content


def require_absent_or_empty(out: Path, name: str) -> None:
    """Raise UserError if an output folder exists and is not empty. name: the option that names it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{name}: {out} exists already; remove it or choose another")


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace a file by `content` such that a reader or a crash finds the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_CHECKPOINT = re.compile(r"step_(\d{6,})")


def checkpoint_step(name: str) -> int | None:
    """Return the step of a complete checkpoint's folder of this name, step_000050; None for any other name."""
    match = _CHECKPOINT.fullmatch(name)
    return None if match is None else int(match[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a run's folder of checkpoints, oldest first; none if there is no folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [(step, path) for path in paths if (step := checkpoint_step(path.name)) is not None]
    return [path for _, path in sorted(found)]


def partial_path(out: Path) -> Path:
    """Return the path at which `atomic_directory` builds `out`."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place at the end; after an error nothing of it is left.

    An existing `out` is replaced once the new folder is complete. A full disk or another write error is a UserError.
    """
    partial = partial_path(out)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        yield partial
        publish_directory(partial, out, out.with_name(f".{out.name}.old"))
    except OSError as error:
        raise UserError(write_error_message(out, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_directory(folder: Path, target: Path, replaced: Path) -> None:
    """Bring a complete folder to the disk and rename it to `target`.

    An existing `target` is first renamed to `replaced` and then removed; a crash in between leaves one of the two.
    """
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    folder.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_error_message(out: Path, error: OSError) -> str:
    """Return one line on why `out` was not written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk or the quota is full" if full else "writing failed"
    return f"{out}: {reason} ({error.strerror or error}); nothing was written there"


def fsync_path(path: Path) -> None:
    """Bring a file's contents, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
