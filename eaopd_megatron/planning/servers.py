"""The SGLang servers that write the student's responses, as a plan sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from eaopd_megatron.planning.layouts import Layout
from eaopd_megatron.planning.memory import kv_cache
from eaopd_megatron.planning.shapes import ModelShape

if TYPE_CHECKING:
    from eaopd_megatron.config import Recipe


@dataclass(frozen=True)
class Servers:
    """Of rollout.engine=sglang. What they hold has no part in the trainer's layout."""

    count: int = 1
    tensor_parallel: int = 1
    placement: Literal["separate", "colocated"] = "separate"
    memory_fraction: float = 0.8
    max_running: int = 64
    ahead: bool = False  # the next iteration's responses are written while this one trains

    @classmethod
    def of(cls, recipe: Recipe) -> Servers | None:
        """None: the trainer writes them itself."""
        if recipe.rollout.engine == "local":
            return None
        chosen = recipe.servers
        return cls(
            count=len(chosen.urls) or chosen.count,
            tensor_parallel=chosen.tensor_parallel,
            placement=chosen.placement,
            memory_fraction=chosen.memory_fraction,
            max_running=chosen.max_running,
            ahead=recipe.rollout.max_lag > 0,
        )

    @property
    def colocated(self) -> bool:
        return self.placement == "colocated"

    @property
    def layout(self) -> Layout:
        """Of one."""
        return Layout(self.tensor_parallel)

    @property
    def gpus(self) -> int:
        """Of all."""
        return self.count * self.tensor_parallel

    def weights(self, student: ModelShape, element: int) -> float:
        """Bytes on a GPU."""
        return student.on_rank(self.layout, 0).total * element

    def cached_tokens(self, student: ModelShape, element: int, limit: float) -> float:
        """That a server's cache has room for, where a GPU has so many bytes (limit); below 0: none for the weights."""
        room = self.memory_fraction * limit - self.weights(student, element)
        return room / kv_cache(student, student.layers, self.layout, element)
