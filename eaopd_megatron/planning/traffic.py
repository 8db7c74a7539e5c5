"""Bytes that a GPU sends, by kind. Collectives as rings: an all-reduce of M bytes over n ranks sends 2 (n−1)/n · M,
an all-gather or reduce-scatter of a whole of M bytes half of that."""

from __future__ import annotations

from dataclasses import dataclass

from eaopd_megatron.models.shapes import ModelShape, ParameterCounts
from eaopd_megatron.planning.activations import FP32_BYTES
from eaopd_megatron.planning.layouts import PlannedLayout

OBJECTIVE_ROWS = 16  # fp32 numbers a token that each rank gives to the objective's one exchange, about


@dataclass(frozen=True)
class TrafficFlow:
    """What one kind of parallelism sends, and over how many neighbouring GPUs its groups spread."""

    kind: str
    bytes: float
    span: int


def ring_share(ranks: int) -> float:
    """Of a whole, sent by each rank in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def forward_traffic(shape: ModelShape, layout: PlannedLayout, tokens: float, element: int) -> list[TrafficFlow]:
    """A forward pass over so many tokens (before the context-parallel cut)."""
    return _layers(shape, layout, tokens, element, backward=False)


def training_traffic(
    shape: ModelShape, layout: PlannedLayout, tokens: float, rows: float, element: int
) -> list[TrafficFlow]:
    """Forward and backward over so many tokens, of which so many rows have a loss."""
    flows = _layers(shape, layout, tokens, element, backward=True)
    tp = layout.tensor_parallel
    rows /= layout.context_parallel
    exchange = ring_share(tp) * tp * rows * OBJECTIVE_ROWS * FP32_BYTES
    if not layout.sequence_parallel:  # the hidden states' gradient; else a part of the gather's backward
        exchange += 2 * ring_share(tp) * rows * shape.hidden * FP32_BYTES
    return [*flows, TrafficFlow("objective", exchange, tp)]


def gradient_traffic(
    parameters: ParameterCounts, layout: PlannedLayout, element: int, *, distributed: bool, tied_rows: int = 0
) -> list[TrafficFlow]:
    """One reduction of fp32 gradients over the ranks with the same weights.

    distributed: reduce-scattered, and the new weights gathered. tied_rows: elements of a tied embedding, which
    the first and the last pipeline stage sum.
    """
    copies = layout.data_parallel * layout.context_parallel
    sent = 0.0
    for count, ranks in ((parameters.dense, copies), (parameters.expert, layout.expert_data_parallel)):
        sent += ring_share(ranks) * count * (FP32_BYTES + element if distributed else 2 * FP32_BYTES)
    flows = [
        TrafficFlow("data: gradients and weights" if distributed else "data: gradients", sent, _stage_span(layout))
    ]
    if tied_rows and layout.pipeline_parallel > 1:
        flows.append(TrafficFlow("pipeline: tied embeddings", tied_rows * FP32_BYTES, layout.gpus))
    return flows


def payload_traffic(rows: float, row_bytes: int, gpus: int) -> TrafficFlow:
    """Of a teacher elsewhere, over HTTP, each GPU of it sending its share."""
    return TrafficFlow("teacher's answers (HTTP)", rows * row_bytes / gpus, 10**6)


def weight_sync_traffic(shape: ModelShape, servers: int, element: int, span: int = 10**6) -> TrafficFlow:
    """The student's weights from the first rank's GPU to each server."""
    return TrafficFlow("weights to servers", shape.hf_parameters().total * element * servers, span)


def _layers(
    shape: ModelShape, layout: PlannedLayout, tokens: float, element: int, *, backward: bool
) -> list[TrafficFlow]:
    tp, pp, cp, ep = (
        layout.tensor_parallel,
        layout.pipeline_parallel,
        layout.context_parallel,
        layout.expert_parallel * layout.expert_tensor_parallel,
    )
    states = tokens / cp * shape.hidden * element  # of one rank's tokens before the sequence-parallel cut
    layers = shape.layers / pp
    experts = shape.expert_layers / pp
    halves = 2 * layers - experts  # attentions and dense MLPs, each between two collectives
    both = 2 if backward else 1
    if layout.sequence_parallel:
        # gather and scatter forward and backward; backward gathers the product's input once more
        tensor = halves * (2 * both + backward) * ring_share(tp) * states + both * ring_share(tp) * states * 2
    else:
        tensor = (halves * both + 1) * 2 * ring_share(tp) * states
    cut = states / layout.sequence_shards
    chunks = layout.virtual_pipeline if pp > 1 else 0
    keys_values = 2 * tokens * shape.kv_width / tp * element
    flows = [
        TrafficFlow("tensor: gather and scatter" if layout.sequence_parallel else "tensor: all-reduce", tensor, tp),
        TrafficFlow("pipeline: hidden states", both * chunks * cut, layout.gpus),
        TrafficFlow("context: keys and values", both * layers * ring_share(cp) * keys_values, tp * cp),
        TrafficFlow(
            "expert: all-to-all", both * 2 * experts * ring_share(ep) * shape.experts_per_token * cut, tp * cp * ep
        ),
    ]
    return flows


def _stage_span(layout: PlannedLayout) -> int:
    return layout.gpus // layout.pipeline_parallel
