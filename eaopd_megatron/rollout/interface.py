"""The interface of the engines that generate the student's responses: the trainer's own ranks, or SGLang servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from eaopd_megatron.data.types import Prompt, Sample, SamplingParams

SamplingKey = tuple[int | str, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """One response to each prompt, over all data-parallel ranks.

    sampling_keys: one RNG key per response (`data.prompts.seeded_generator`), used where the trainer draws the tokens.
    local_indices: indices of the responses that this data-parallel rank owns.
    """

    prompts: Sequence[Prompt]
    sampling_keys: Sequence[SamplingKey]
    local_indices: Sequence[int]
    sampling: SamplingParams


@dataclass(frozen=True, eq=False)
class RolloutHandle:
    """A submitted request. Its responses can be collected once."""

    request: GenerationRequest


class RolloutEngine(Protocol):
    """All ranks make the same calls with the same arguments, except for `GenerationRequest.local_indices`.

    An engine without processes of its own inherits `open`, `finish_generation` and `close`, which do nothing.
    """

    def open(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        """Start the engine. Call it first.

        prompts: all that may be requested. max_tokens: upper bound of the tokens of one prompt and its response.
        """
        return

    def update_weights(self, version: int) -> None:
        """Generate with the model's current weights from now on; `version` names them."""

    def submit(self, request: GenerationRequest) -> RolloutHandle:
        """Request responses. They may be generated in the background."""

    def collect(self, handle: RolloutHandle) -> Iterator[list[Sample]]:
        """Yield this rank's responses in parts as they finish. Every rank gets the same number of parts.

        `Sample.index` is the prompt's index in `GenerationRequest.prompts`; each occurs once. Raises StopRequested or
        ServiceUnavailable on all ranks.
        """

    def finish_generation(self) -> None:
        """Pause until the next `update_weights`; colocated servers free their GPU memory."""
        return

    def close(self) -> None:
        """Stop everything that the engine started. Idempotent."""
        return
