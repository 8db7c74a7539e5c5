"""A folder that is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from eaopd_megatron.errors import UserError


def require_absent_or_empty(out: Path, name: str) -> None:
    """Refuse (UserError) an output folder that holds something; `name` is what the user calls it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{name}: {out} exists already; remove it or choose another")


def partial_path(out: Path) -> Path:
    """Where `out` is written until it is whole."""
    return out.with_name(f".{out.name}.partial")


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out` that takes its name at the end; after an error nothing of it is left.

    An `out` that exists is replaced once the new one is complete. A full disk or another write error is a UserError.
    """
    partial, old = partial_path(out), out.with_name(f".{out.name}.old")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an earlier run that was killed
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            fsync_path(file)
        fsync_path(partial)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        partial.rename(out)
        fsync_path(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(write_error_message(out, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_error_message(out: Path, error: OSError) -> str:
    """One line on why `out` was not written."""
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


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replaces a file by `content`, so that a reader or a crash meets the old one or the new one, never a part."""
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
