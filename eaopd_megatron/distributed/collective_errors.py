"""Errors that all ranks raise together, so that none waits in a collective that another rank never enters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from eaopd_megatron.distributed.parallel_state import ParallelState, gather_objects
from eaopd_megatron.errors import UserError

T = TypeVar("T")
ErrorDescription = tuple[str, int, str]
"""(kind, errno, text): the part of an error that is sent to other ranks."""


def run_on_all_or_raise(parallel: ParallelState, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run this rank's work and wait for the others (a barrier). If any fails, all raise the lowest failed rank's error.

    group: of all ranks, for a thread that must not use training's; None: the default group. The error is raised as
    UserError or OSError (with its errno) if it was one, otherwise as RuntimeError.
    """
    cause: Exception | None = None
    try:
        result = work()
    except Exception as error:
        cause = error
    raise_on_all(parallel, cause, group)
    return result


def run_on_main_or_raise(
    parallel: ParallelState, work: Callable[[], T], group: dist.ProcessGroup | None = None
) -> T | None:
    """Run `work` on the main rank while the others wait; return its result there. As `run_on_all_or_raise`."""
    return run_on_all_or_raise(parallel, lambda: work() if parallel.is_main else None, group)


def raise_on_all(parallel: ParallelState, error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the lowest failed rank's error on all ranks, if any has one. Collective. As `run_on_all_or_raise`."""
    errors = gather_objects(describe_error(error) if error else None, parallel.world_size, group)
    failed = {rank: description for rank, description in enumerate(errors) if description is not None}
    if failed:
        raise first_error(failed) from error


def first_error(failed: Mapping[int, ErrorDescription]) -> Exception:
    """Return the error of the lowest failed rank."""
    rank = min(failed)
    kind, number, text = failed[rank]
    if kind == "user":
        return UserError(text)
    return OSError(number, text) if kind == "system" else RuntimeError(f"rank {rank}: {text}")


def describe_error(error: BaseException) -> ErrorDescription:
    """Return the picklable description of an error."""
    if isinstance(error, UserError):
        return "user", 0, str(error)
    system = find_os_error(error)
    if system is not None and system.errno is not None:
        where = f": {system.filename}" if system.filename else ""
        return "system", system.errno, f"{system.strerror}{where}"
    return "other", 0, f"{type(error).__name__}: {error}"


def find_os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError behind an error, if any (torch raises its own error after a failed write)."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
