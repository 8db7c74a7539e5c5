"""Requests between the HTTP side, whose threads wait for answers, and the ranks, which score."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from eaopd_megatron.teacher.wire import ScoreRequest


class Unavailable(Exception):
    """Not now; its text says why, in one line."""


class Full(Unavailable):
    """Too many requests are here; ask again."""


class Stopping(Unavailable):
    """Ask another replica."""


class _Work:
    """A request and, once it is there, its answer."""

    def __init__(self, request: ScoreRequest) -> None:
        self.request = request
        self.done = threading.Event()
        self.rows: torch.Tensor | None = None  # none, though done: it was given up


class Queue:
    """Bounded: a request counts from its acceptance until its answer is sent, so memory is bounded too."""

    def __init__(self, places: int, patience: float = 20.0) -> None:
        """places: requests that may be here at the same time. patience: seconds that another one waits for a place."""
        self._places, self._patience = places, patience
        self._held = 0
        self._stopping = False
        self._change = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._unfinished: dict[str, _Work] = {}

    @contextmanager
    def answer(self, request: ScoreRequest) -> Iterator[torch.Tensor]:
        """The rows of a request, once it is scored; leave it when they are sent.

        A request that comes again while it is worked on waits for the same work. Raises Full or Stopping, and
        ValueError for the id of another request.
        """
        self._take_place()
        try:
            work = self._work(request)
            work.done.wait()
            if work.rows is None:
                raise Stopping("the teacher is stopping")
            yield work.rows
        finally:
            with self._change:
                self._held -= 1
                self._change.notify_all()

    def take(self, count: int, seconds: float) -> list[ScoreRequest]:
        """The requests that have waited longest, `count` at the most; none where none came within `seconds`."""
        with self._change:
            self._change.wait_for(lambda: self._waiting, seconds)
            return [self._waiting.popleft().request for _ in range(min(count, len(self._waiting)))]

    def finish(self, requests: Sequence[ScoreRequest], rows: Sequence[torch.Tensor]) -> None:
        """The answers to requests that were taken: [response tokens, bytes] uint8, each."""
        with self._change:
            for request, answer in zip(requests, rows, strict=True):
                work = self._unfinished.pop(request.id)
                work.rows = answer
                work.done.set()

    def stop(self) -> None:
        """No request is accepted any more, and those that no rank has begun are refused."""
        with self._change:
            self._stopping = True
            self._refuse(list(self._waiting))
            self._waiting.clear()
            self._change.notify_all()

    def drain(self, seconds: float) -> bool:
        """Refuses what is still unfinished; whether every answer was sent within `seconds`."""
        with self._change:
            self._refuse(list(self._unfinished.values()))
            return self._change.wait_for(lambda: not self._held, seconds)

    @property
    def stopping(self) -> bool:
        return self._stopping

    def _take_place(self) -> None:
        with self._change:
            free = self._change.wait_for(lambda: self._stopping or self._held < self._places, self._patience)
            if self._stopping:
                raise Stopping("the teacher is stopping")
            if not free:
                raise Full(f"{self._places} requests are here already")
            self._held += 1

    def _work(self, request: ScoreRequest) -> _Work:
        with self._change:
            work = self._unfinished.get(request.id)
            if work is None:
                if self._stopping:
                    raise Stopping("the teacher is stopping")
                work = self._unfinished[request.id] = _Work(request)
                self._waiting.append(work)
                self._change.notify_all()
            elif not work.request.same(request):
                raise ValueError(f"another request with the id {request.id} is worked on")
            return work

    def _refuse(self, works: Sequence[_Work]) -> None:
        for work in works:
            self._unfinished.pop(work.request.id, None)
            work.done.set()
