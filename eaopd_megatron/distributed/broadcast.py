"""What one rank sees of the servers, told to all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from eaopd_megatron.distributed.errors import agree, describe
from eaopd_megatron.distributed.parallel_state import Parallel
from eaopd_megatron.errors import ServiceUnavailable, StopRequested, UserError

T = TypeVar("T")
_KEEPALIVE_SECONDS = 10.0
"""The longest that a rank waits in a collective, however long the servers take."""


def broadcast_events(
    parallel: Parallel, events: Iterator[T | None] | None, stop_signal: Callable[[], int] = lambda: 0
) -> Iterator[T]:
    """Yields on every rank what `news` yields on the main rank (None there: nothing yet, ask again at once).

    Collective over all ranks. asked: the number of a signal that asks the run to stop, or 0. Raises on every rank what
    the main rank's `news` raises: StopRequested, ServiceUnavailable for a UserError, RuntimeError for anything else.
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
        if kind == "asked":
            raise StopRequested(value)
        if kind == "failed":
            sort, _, text = value
            raise ServiceUnavailable(text) if sort == "user" else RuntimeError(f"rank 0: {text}")
        if kind == "news":
            yield value


def wait_on_all_ranks(parallel: Parallel, done: Callable[[], bool], stop_signal: Callable[[], int] = lambda: 0) -> None:
    """Returns on every rank once `done` is true on all of them.

    Collective over all ranks. done: may take a few tenths of a second, and is asked again and again until it is true.
    Raises on every rank StopRequested where one was asked to stop, or else what `done` raises on one: ServiceUnavailable for a
    UserError, RuntimeError for anything else.
    """
    waits = True
    while True:
        error: Exception | None = None
        try:
            waits = waits and not done()
        except Exception as raised:
            error = raised
        state = [stop_signal(), int(error is not None), int(waits)]
        if parallel.world_size > 1:
            shared = torch.tensor(state, device=parallel.device)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            state = shared.tolist()
        number, failed, waiting = state
        if number:
            raise StopRequested(number)
        if failed:
            _raise_on_all_ranks(parallel, error)
        if not waiting:
            return


def _raise_on_all_ranks(parallel: Parallel, error: Exception | None) -> None:
    def mine() -> None:
        if error is not None:
            raise error

    try:
        agree(parallel, mine)
    except UserError as first:
        raise ServiceUnavailable(str(first)) from None


def _next_event(events: Iterator[T | None], stop_signal: Callable[[], int]) -> tuple[str, Any]:
    """The next one, or after BEAT_SECONDS only that there is none yet."""
    since = time.monotonic()
    try:
        for value in events:
            if number := stop_signal():
                return "asked", number
            if value is not None:
                return "news", value
            if time.monotonic() - since > _KEEPALIVE_SECONDS:
                return "beat", None
    except Exception as error:
        return "failed", describe(error)
    return "end", None
