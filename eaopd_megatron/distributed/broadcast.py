"""Events that one rank sees, told to all ranks, and waits that all ranks end together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from eaopd_megatron.distributed.collective_errors import describe_error, raise_on_all
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import ServiceUnavailable, StopRequested, UserError

T = TypeVar("T")
_KEEPALIVE_SECONDS = 10.0
"""Upper bound of a rank's wait in one collective, however long the servers take."""


def broadcast_events(
    parallel: ParallelState, events: Iterator[T | None] | None, stop_signal: Callable[[], int] = lambda: 0
) -> Iterator[T]:
    """Yield on every rank what `events` yields on the main rank. Collective over all ranks.

    events: None on the other ranks; a None that it yields means that nothing has happened yet, and it is polled again
    at once. stop_signal: returns the number of the signal that asks the run to stop, or 0. Raises on every rank what
    the main rank meets: StopRequested for a signal, ServiceUnavailable for a UserError of `events`, RuntimeError for
    any other exception.
    """
    while True:
        event = None if events is None else _next_event(events, stop_signal)
        if parallel.world_size > 1:
            box = [event]
            dist.broadcast_object_list(box, src=0)
            event = box[0]
        assert event is not None
        kind, value = event
        if kind == "end":
            return
        if kind == "stop":
            raise StopRequested(value)
        if kind == "error":
            sort, _, text = value
            raise ServiceUnavailable(text) if sort == "user" else RuntimeError(f"rank 0: {text}")
        if kind == "event":
            yield value


def wait_on_all_ranks(
    parallel: ParallelState, done: Callable[[], bool], stop_signal: Callable[[], int] = lambda: 0
) -> None:
    """Return on every rank once `done` is true on all of them. Collective over all ranks.

    done: polled until it is true; may block for a few tenths of a second. Raises on every rank StopRequested where one
    rank got a signal, else what `done` raises on one: ServiceUnavailable for a UserError, RuntimeError for any other
    exception.
    """
    waiting = True
    while True:
        error: Exception | None = None
        try:
            waiting = waiting and not done()
        except Exception as raised:
            error = raised
        state = [stop_signal(), int(error is not None), int(waiting)]
        if parallel.world_size > 1:
            shared = torch.tensor(state, device=parallel.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            state = shared.tolist()
        number, failed, any_waiting = state
        if number:
            raise StopRequested(number)
        if failed:
            try:
                raise_on_all(parallel, error)
            except UserError as first:
                raise ServiceUnavailable(str(first)) from None
        if not any_waiting:
            return


def _next_event(events: Iterator[T | None], stop_signal: Callable[[], int]) -> tuple[str, Any]:
    """Return the next event, or a keepalive after _KEEPALIVE_SECONDS without one."""
    since = time.monotonic()
    try:
        for value in events:
            if number := stop_signal():
                return "stop", number
            if value is not None:
                return "event", value
            if time.monotonic() - since > _KEEPALIVE_SECONDS:
                return "keepalive", None
    except Exception as error:
        return "error", describe_error(error)
    return "end", None
