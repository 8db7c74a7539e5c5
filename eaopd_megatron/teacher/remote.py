"""A teacher that lives elsewhere, as the student's ranks see it: asked while responses are still written, waited for
before they are learned from.

The requests of a data-parallel copy are dealt over its ranks of the last pipeline stage, and each pulls its own share.
What came is bytes in host memory on the rank that pulled it; it is exchanged where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Generic, Protocol

import torch

from eaopd_megatron.config.tree import Teacher as Options
from eaopd_megatron.data.samples import MicroBatch, Sample
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.services.pool import C, Call, L
from eaopd_megatron.teacher.interface import TeacherSignal
from eaopd_megatron.teacher.rows import Rows
from eaopd_megatron.teacher.terminal import TerminalMap


class Source(Protocol[C, L]):
    """What a placement must give: how its servers are asked."""

    def calls(
        self, samples: Sequence[Sample], number: str
    ) -> Sequence[tuple[Call[C, L, torch.Tensor], Sequence[Sample]]]:
        """The samples, each with at least one response token, as calls. number: begins the ids of them all; unique over
        the run.

        A call answers the rows [response tokens of its samples, rows.bytes] uint8, sample after sample. Making one
        costs little: every rank makes all of its copy's and runs its share.
        """

    def client(self, url: str, key: str | None) -> C:
        """Raises UserError for a URL that is none."""

    async def admit(self, client: C, longest: int) -> L:
        """What the server can take. longest: tokens of a prompt and its response together, at the most. Raises
        ServerGone or Busy (not yet) or UserError (another teacher than the recipe's)."""


class Replicas(Protocol):
    """The servers that the main rank starts."""

    def start(self, longest: int) -> None:
        """Begins to start them."""

    def urls(self) -> Generator[None, None, list[str]]:
        """Yields while they are not there, at least a few times a second; its result are their URLs. Raises
        UserError."""

    @property
    def key(self) -> str | None:
        """What they want in the Authorization header."""

    def close(self) -> None:
        """Ends them. A second call does nothing."""


class RemoteTeacher(Generic[C, L]):
    """`interface.Teacher` by servers."""

    def __init__(
        self,
        parallel: Parallel,
        source: Source[C, L],
        *,
        rows: Rows,
        head: torch.Tensor | None,
        terminal: TerminalMap,
        replicas: Replicas | None,
        options: Options,
        asked: Callable[[], int],
        report: Callable[[str], None],
    ) -> None:
        """rows: format of the answers. head: for hidden states, on the last pipeline stage, the teacher's output head
        in the student's layout [V_padded/tp, h_T]. replicas: on the main rank, where the trainer starts them. asked:
        the number of a signal that asks the run to stop, or 0."""
        raise NotImplementedError

    def open(self, longest: int) -> None:
        """As `Teacher.open`; returns once a replica is there. Collective. Raises Asked or ServiceFailed on all ranks,
        and UserError for servers that are not the recipe's teacher."""

    def ask(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.ask`: the requests run in the background."""

    def wait(self, samples: Sequence[Sample]) -> None:
        """As `Teacher.wait`."""

    def signals(self, batches: Sequence[MicroBatch]) -> Callable[[int], TeacherSignal]:
        """As `Teacher.signals`."""
        raise NotImplementedError

    def labels(self, batch: MicroBatch) -> torch.Tensor | None:
        """As `Teacher.labels`."""
        raise NotImplementedError

    def close(self) -> None:
        """As `Teacher.close`: what is still asked for is given up, replicas that were started here end."""
