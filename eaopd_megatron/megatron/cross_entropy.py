"""Megatron-Core's own vocab-parallel cross entropy: the yardstick of the objective's benchmark."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss [n] (nats) of targets [n] under this rank's logits [n, V/tp]. Needs Megatron-Core's groups."""
    return vocab_parallel_cross_entropy(logits[None], targets[None])[0]
