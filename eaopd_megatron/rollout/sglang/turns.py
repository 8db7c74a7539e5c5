"""Trainer and servers on the same GPUs, in turns: what happens on all ranks between one's turn and the other's."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from eaopd_megatron.checkpoint.agreement import agree
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.megatron.offload import TrainerMemory
from eaopd_megatron.rollout.sglang.keeper import Keeper
from eaopd_megatron.rollout.sglang.memory import Colocated
from eaopd_megatron.services.client import Client


class Turns:
    """The order is that of `memory`. Collective over all ranks; keeper: on the main rank."""

    def __init__(self, parallel: Parallel, trainer: TrainerMemory, keeper: Keeper | None) -> None:
        self._parallel, self._trainer, self._keeper = parallel, trainer, keeper
        self._servers = Colocated()
        self.of_servers = False

    def begin(self) -> None:
        """The trainer's memory is free for servers: those that start take what they need."""
        if not self.of_servers:
            self._trainer.release()
            agree(self._parallel, self._wake)
            self.of_servers = True

    def weights(self) -> None:
        """Servers have room for weights, which are to be pushed next."""
        agree(self._parallel, lambda: self._each(self._servers.before_weights))

    def cache(self) -> None:
        """... and for the cache, with which they generate."""
        agree(self._parallel, lambda: self._each(self._servers.before_generation))

    def end(self) -> None:
        """It is the trainer's turn."""
        if self.of_servers:
            agree(self._parallel, self._rest)
            self._trainer.resume()
            self.of_servers = False

    def forget(self, client: Client) -> None:
        """It died."""
        self._servers.forget(client)

    def _wake(self) -> None:
        if self._keeper is not None:
            self._keeper.start_dead_ones()

    def _rest(self) -> None:
        if self._keeper is not None:
            self._keeper.end_absent_ones()
            self._each(self._servers.after_generation)

    def _each(self, work: Callable[[Sequence[Client]], Coroutine[Any, Any, dict[Client, str]]]) -> None:
        clients = [] if self._keeper is None else self._keeper.present()
        if self._keeper is not None and clients:  # none: also where they were ended, and the loop with them
            self._keeper.given((), self._keeper.loop.run(work(clients)))
