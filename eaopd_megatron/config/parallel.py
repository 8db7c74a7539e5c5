"""How one model is cut over ranks. Without torch, so that a recipe and a plan need not import it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

from eaopd_megatron.errors import UserError

Recompute = Literal["none", "selective", "full"]
"""Activations that backward recomputes: none, those of core attention, or complete layers from their inputs."""


@dataclass(frozen=True)
class ParallelLayout:
    """How one model is cut over ranks. The data-parallel size is what the number of ranks leaves.

    tensor x context x data ranks make a pipeline stage; expert parallelism cuts the experts over the same ranks.
    """

    tensor_parallel: int = 1
    sequence_parallel: bool = False
    pipeline_parallel: int = 1
    virtual_pipeline: int = 1  # model chunks a rank holds; more than 1: the interleaved schedule
    context_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1  # ranks that share one expert's matrices

    @property
    def model_parallel_size(self) -> int:
        """Ranks that one copy of the model takes."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def expert_model_parallel_size(self) -> int:
        """Ranks that one copy of the experts takes, in all pipeline stages."""
        return self.expert_parallel * self.expert_tensor_parallel * self.pipeline_parallel

    @property
    def min_data_parallel_size(self) -> int:
        """The smallest data-parallel size whose ranks hold all experts."""
        return math.lcm(self.model_parallel_size, self.expert_model_parallel_size) // self.model_parallel_size

    @property
    def min_world_size(self) -> int:
        """Ranks of the smallest world that holds the model."""
        return self.model_parallel_size * self.min_data_parallel_size

    def layers_of(self, stage: int, num_layers: int) -> list[int]:
        """Return the global indices of a pipeline stage's layers, over all its virtual stages."""
        per_chunk = num_layers // (self.pipeline_parallel * self.virtual_pipeline)
        starts = [(chunk * self.pipeline_parallel + stage) * per_chunk for chunk in range(self.virtual_pipeline)]
        return [start + i for start in starts for i in range(per_chunk)]

    def without_experts(self) -> Self:
        """The same ranks for a model that has none: a dense teacher of a mixture of experts, or the other way round."""
        return replace(self, expert_parallel=1, expert_tensor_parallel=1)

    def check_world_size(self, world_size: int) -> None:
        """Refuse (UserError) a number of ranks that this layout does not divide."""
        if world_size % self.model_parallel_size:
            names = ("tensor_parallel", "pipeline_parallel", "context_parallel")
            parts = [f"student.{name}={getattr(self, name)}" for name in names if getattr(self, name) > 1]
            product = f" ({self.model_parallel_size} ranks a copy)" if len(parts) > 1 else ""
            raise UserError(f"{' x '.join(parts)}{product} does not divide the {world_size} ranks that were started")
        if world_size % self.expert_model_parallel_size:
            raise UserError(
                f"student.expert_parallel={self.expert_parallel} x expert_tensor_parallel="
                f"{self.expert_tensor_parallel} x pipeline_parallel={self.pipeline_parallel} does not divide the "
                f"{world_size} ranks that were started"
            )
