"""Bytes that a GPU sends, by kind. Collectives are counted as rings: an all-reduce of M bytes over n ranks sends
2 (n−1)/n · M, an all-gather to or reduce-scatter from M bytes half of that."""

from __future__ import annotations

from dataclasses import dataclass

from eaopd_megatron.models.shapes import ModelShape, ParameterCounts
from eaopd_megatron.objective.settings import EXCHANGE_FLOATS_PER_TOKEN
from eaopd_megatron.planning.activations import FP32_BYTES
from eaopd_megatron.planning.workload import PlannedLayout

ACROSS_HOSTS = 10**6  # GPUs


@dataclass(frozen=True)
class TrafficFlow:
    """Bytes of one kind of parallelism. span: consecutive GPUs over which a group spreads."""

    kind: str
    bytes: float
    span: int


def ring_share(ranks: int) -> float:
    """Return the share of the complete tensor that each rank sends in an all-gather or a reduce-scatter."""
    return (ranks - 1) / ranks


def training_traffic(
    shape: ModelShape, layout: PlannedLayout, tokens: float, rows: float, element: int
) -> list[TrafficFlow]:
    """Return the traffic of forward and backward over `tokens` tokens, `rows` of which have a loss."""
    tp = layout.tensor_parallel
    rows /= layout.context_parallel
    exchange = ring_share(tp) * tp * rows * EXCHANGE_FLOATS_PER_TOKEN * FP32_BYTES
    if not layout.sequence_parallel:  # the hidden states' gradient; else a part of the gather's backward
        exchange += 2 * ring_share(tp) * rows * shape.hidden * FP32_BYTES
    layers = forward_traffic(shape, layout, tokens, element, backward=True)
    return [*layers, TrafficFlow("objective", exchange, tp)]


def gradient_traffic(
    parameters: ParameterCounts, layout: PlannedLayout, element: int, *, distributed: bool, tied_rows: int = 0
) -> list[TrafficFlow]:
    """Return the traffic of one reduction of fp32 gradients over the ranks with the same weights.

    distributed: gradients are reduce-scattered and the new weights all-gathered. tied_rows: elements of a tied
    embedding, which the first and the last pipeline stage sum.
    """
    sent = 0.0
    copies = layout.data_parallel * layout.context_parallel
    for count, ranks in ((parameters.dense, copies), (parameters.expert, layout.expert_data_parallel)):
        sent += ring_share(ranks) * count * (FP32_BYTES + element if distributed else 2 * FP32_BYTES)
    kind = "data: gradients and weights" if distributed else "data: gradients"
    flows = [TrafficFlow(kind, sent, layout.gpus // layout.pipeline_parallel)]
    if tied_rows and layout.pipeline_parallel > 1:
        flows.append(TrafficFlow("pipeline: tied embeddings", tied_rows * FP32_BYTES, layout.gpus))
    return flows


def weight_sync_traffic(shape: ModelShape, servers: int, element: int, span: int = ACROSS_HOSTS) -> TrafficFlow:
    """Return the traffic of the student's weights from the first rank's GPU to each server."""
    return TrafficFlow("weights to servers", shape.hf_parameters().total * element * servers, span)


def forward_traffic(
    shape: ModelShape, layout: PlannedLayout, tokens: float, element: int, *, backward: bool = False
) -> list[TrafficFlow]:
    """Return the traffic of the layers' forward (and backward) pass over `tokens` tokens, before the context-parallel
    split."""
    tp, pp, cp = layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel
    ep = layout.expert_parallel * layout.expert_tensor_parallel
    states = tokens / cp * shape.hidden * element  # of one rank's tokens before the sequence-parallel split
    layers, experts = shape.layers / pp, shape.expert_layers / pp
    blocks = 2 * layers - experts  # attentions and dense MLPs, each between two collectives
    passes = 2 if backward else 1
    if layout.sequence_parallel:
        # gather and scatter forward and backward; backward gathers the product's input once more
        tensor = blocks * (2 * passes + backward) * ring_share(tp) * states + passes * ring_share(tp) * states * 2
    else:
        tensor = (blocks * passes + 1) * 2 * ring_share(tp) * states
    local = states / layout.sequence_shards
    chunks = layout.virtual_pipeline if pp > 1 else 0
    keys_values = passes * layers * ring_share(cp) * 2 * tokens * shape.kv_width / tp * element
    dispatch = passes * 2 * experts * ring_share(ep) * shape.experts_per_token * local
    return [
        TrafficFlow("tensor: gather and scatter" if layout.sequence_parallel else "tensor: all-reduce", tensor, tp),
        TrafficFlow("pipeline: hidden states", passes * chunks * local, layout.gpus),
        TrafficFlow("context: keys and values", keys_values, tp * cp),
        TrafficFlow("expert: all-to-all", dispatch, tp * cp * ep),
    ]
