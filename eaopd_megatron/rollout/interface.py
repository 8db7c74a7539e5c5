"""What writes the student's responses: the trainer's own ranks, or servers. One interface, used by all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from eaopd_megatron.data.types import Prompt, Sample, Sampling

SamplingKey = tuple[int | str, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """The responses of all data-parallel ranks: one to each prompt.

    keys: what each response's random numbers are a function of (`data.random`), where the trainer draws them. mine:
    which of them are this data-parallel rank's.
    """

    prompts: Sequence[Prompt]
    sampling_keys: Sequence[SamplingKey]
    local_indices: Sequence[int]
    sampling: Sampling


@dataclass(frozen=True, eq=False)
class RolloutHandle:
    """For responses that are still to be fetched, once."""

    request: GenerationRequest


class RolloutEngine(Protocol):
    """All ranks make the same calls with the same arguments, but for `GenerationRequest.local_indices`."""

    def open(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Comes first. prompts: all that may come; longest: tokens of one and its response, at the most."""

    def update_weights(self, version: int) -> None:
        """From now on responses are written by the model's weights as they are, under this version."""

    def submit(self, request: GenerationRequest) -> RolloutHandle:
        """The responses may be written while the caller does something else."""

    def collect(self, handle: RolloutHandle) -> Iterator[list[Sample]]:
        """This rank's responses to what was wanted, in parts, as they are finished; as many parts on every rank.

        `index` is a prompt's place among `GenerationRequest.prompts`; each comes once. Raises StopRequested or ServiceUnavailable on all ranks.
        """

    def finish_generation(self) -> None:
        """Nothing is wanted until the next `publish`."""

    def close(self) -> None:
        """Ends what was started for it. A second call does nothing."""
