"""What a recipe asks of its models in an iteration, in samples and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eaopd_megatron.planning.activations import MicroBatch, Recompute
from eaopd_megatron.planning.layouts import Layout

if TYPE_CHECKING:
    from eaopd_megatron.config import Recipe

BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
"""Of an activation, and of weights but fp8's."""


@dataclass(frozen=True)
class Workload:
    """The recipe's sizes that memory, traffic and time depend on."""

    prompts: int  # an iteration
    mini_batch: int  # samples an update
    micro_batch_tokens: int
    rollout_batch: int
    longest_prompt: int
    longest_response: int
    student_element: int = 2  # bytes of a weight
    recompute: Recompute = "none"
    distributed_optimizer: bool = False
    offloaded_moments: bool = False  # in host memory between updates

    @classmethod
    def of(cls, recipe: Recipe) -> Workload:
        return cls(
            prompts=recipe.train.prompts_per_iteration,
            mini_batch=recipe.train.mini_batch,
            micro_batch_tokens=recipe.train.micro_batch_tokens,
            rollout_batch=recipe.rollout.batch_size,
            longest_prompt=recipe.data.max_prompt_tokens,
            longest_response=recipe.rollout.max_response_tokens,
            student_element=BYTES[recipe.student.precision],
            recompute=recipe.student.recompute,
            distributed_optimizer=recipe.optimizer.distributed,
            offloaded_moments=recipe.optimizer.offload == "moments",
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.longest_prompt + self.longest_response

    @property
    def updates(self) -> int:
        """An iteration."""
        return -(-self.prompts // self.mini_batch)

    def samples(self, layout: Layout) -> int:
        """Of an update, on the data-parallel rank that has most."""
        return -(-self.mini_batch // layout.data_parallel)

    def generated(self, layout: Layout) -> int:
        """Sequences that a rank generates together; context-parallel ranks have sequences of their own."""
        return min(self.rollout_batch, -(-self.prompts // layout.generators))

    def micro_batch(self, layout: Layout) -> MicroBatch:
        """The largest one."""
        whole = self.samples(layout) * self.longest
        tokens = max(self.longest, min(self.micro_batch_tokens, whole))
        return MicroBatch(tokens, tokens)

    def micro_batches(self, layout: Layout, sequence: float | None = None) -> int:
        """Of an update on a rank, whose sequences have so many tokens (none: the most)."""
        per = max(1, int(self.micro_batch_tokens // (sequence or self.longest)))
        return -(-self.samples(layout) // per)

    def response_rows(self, batch: MicroBatch, layout: Layout) -> float:
        """Positions of a micro-batch that have a loss."""
        return batch.tokens * self.longest_response / self.longest / layout.context_parallel
