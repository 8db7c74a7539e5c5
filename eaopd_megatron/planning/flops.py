"""Model FLOPs: what a model's own arithmetic asks for, whatever is recomputed, and its share of a GPU's peak.

A product of a matrix of P elements with one token counts 2·P; norms, softmaxes and look-ups count nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from eaopd_megatron.planning.shapes import ModelShape

BACKWARD = 2  # products with the transposed weights and with the transposed inputs, for each forward one


@dataclass(frozen=True)
class Flops:
    """Of one token, forward."""

    layers: float  # the layers' matrices
    attention: float  # queries with keys, and probabilities with values
    head: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head


def forward_flops(shape: ModelShape, context_length: float) -> Flops:
    """Of a token of a causal sequence of context_length tokens, on average: it attends to half of them."""
    expert_layers = len(shape.expert_layers)
    mlp = 3 * shape.hidden * shape.intermediate
    experts = shape.hidden * (shape.experts + 3 * shape.expert_intermediate * shape.experts_per_token)
    weights = shape.layers * shape.attention_weights + (shape.layers - expert_layers) * mlp + expert_layers * experts
    keys = (context_length + 1) / 2
    return Flops(2 * weights, 4 * shape.layers * shape.query_width * keys, 2 * shape.hidden * shape.vocab)


def flops_per_token(shape: ModelShape, context_length: float, *, training: bool = False) -> float:
    """Model FLOPs of a token of a sequence of context_length tokens: forward, or (training) forward and backward.

    shape: `ModelShape.of(config)`. Every token is counted with the output layer; activation recompute is not counted.
    """
    return forward_flops(shape, context_length).total * (1 + BACKWARD if training else 1)


def utilisation(flops: float, seconds: float, gpus: int, peak: float) -> float:
    """Model FLOPs utilisation: FLOPs of all GPUs in so many seconds over what gpus · peak (FLOP/s) could have done."""
    return flops / (seconds * gpus * peak)
