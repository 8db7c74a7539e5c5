"""One rank's error is every rank's error: nobody is left waiting in a collective that another rank never enters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist

from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError

T = TypeVar("T")
ErrorDescription = tuple[str, int, str]
"""(kind, errno, text): what of an error can be sent to other ranks."""


def run_on_all_or_raise(parallel: ParallelState, work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do this rank's own work and wait for the others' (a barrier). When one fails, all ranks raise the first's error.

    group: of all ranks, for a thread that must not use the training's; none: torch.distributed's default.
    The error arrives as UserError or OSError (errno kept) where it was one, otherwise as RuntimeError.
    """
    cause: Exception | None = None
    try:
        result = work()
    except Exception as error:
        cause = error
    errors: list[ErrorDescription | None] = [describe_error(cause) if cause else None]
    if parallel.world_size > 1:
        mine, errors = errors[0], [None] * parallel.world_size
        dist.all_gather_object(errors, mine, group)
    failed = {rank: error for rank, error in enumerate(errors) if error is not None}
    if failed:
        raise first_error(failed) from cause
    return result


def first_error(failed: Mapping[int, ErrorDescription]) -> Exception:
    """The error of the lowest rank that failed."""
    rank = min(failed)
    kind, number, text = failed[rank]
    if kind == "user":
        return UserError(text)
    return OSError(number, text) if kind == "system" else RuntimeError(f"rank {rank}: {text}")


def describe_error(error: BaseException) -> ErrorDescription:
    """An error without the objects that hold it together."""
    if isinstance(error, UserError):
        return "user", 0, str(error)
    system = find_os_error(error)
    if system is not None and system.errno is not None:
        where = f": {system.filename}" if system.filename else ""
        return "system", system.errno, f"{system.strerror}{where}"
    return "other", 0, f"{type(error).__name__}: {error}"


def find_os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an error, if there is one (torch raises its own after a failed write)."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
