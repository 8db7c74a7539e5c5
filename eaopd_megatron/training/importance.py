"""The weights of tokens that older weights than π_old's sampled: π_old/π_rollout, clipped from above.

They multiply the loss outside the objective and carry no gradient. Only stale samples have them: elsewhere the rollout
engine's log-probs, which come from other kernels, stay out of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eaopd_megatron.data.samples import MicroBatch


@dataclass(frozen=True)
class ImportanceWeights:
    """Of a micro-batch's n response tokens on this rank: weight (fp32; exactly 1 where fresh), stale and clipped."""

    values: torch.Tensor
    stale: torch.Tensor
    clipped: torch.Tensor

    @classmethod
    def of(cls, batch: MicroBatch, old: torch.Tensor | None, clip: float) -> ImportanceWeights | None:
        """None where no sample is stale: the loss is left as it is. `old` [n]: π_old's log-probs, the trainer's.

        Raises ValueError for a stale sample without old_logprobs.
        """
        if not any(sample.stale for sample in batch.samples):
            return None
        if old is None:
            raise ValueError("stale samples need old_logprobs: recompute_old_logprobs comes before the update")
        stale = batch.gather([torch.full((len(s.response_ids),), s.stale) for s in batch.samples])
        ratio = (old - batch.rollout_logprobs()).exp()
        return cls(torch.where(stale, ratio.clamp(max=clip), 1.0).detach(), stale, stale & (ratio > clip))
