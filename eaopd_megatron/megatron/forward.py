"""One model chunk's forward pass over packed sequences, and what is computed from the last stage's hidden states.

Shapes: T packed tokens on this context-parallel rank, n response tokens among them, h the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from eaopd_megatron.data.types import MicroBatch
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.layers import PackedSequences, rotate_by_position
from eaopd_megatron.megatron.model import ModelChunks, unwrap_gpt, wait_param_gather
from eaopd_megatron.objective.linear import product_into
from eaopd_megatron.objective.settings import LOGITS_CHUNK_ELEMENTS


def stage_output(chunk: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Return what a chunk, bare or wrapped, passes to the next pipeline stage; the output layer is not run.

    The last stage returns the hidden states after the final norm, [T, 1, h]; under sequence parallelism [T/tp, 1, h].
    """
    gpt = unwrap_gpt(chunk)
    fused = gpt.config.apply_rope_fusion
    packed = PackedSequences.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, fused_rotary=fused)
    last, gpt.post_process = gpt.post_process, False  # GPTModel then returns the input of its output layer
    try:
        with nullcontext() if fused else rotate_by_position(gpt, batch.positions[0]):
            return chunk(
                input_ids=batch.token_ids,
                position_ids=batch.positions,
                attention_mask=None,
                packed_seq_params=packed,
            )
    finally:
        gpt.post_process = last


def response_hidden_states(model: ModelChunks, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Return the last stage's `stage_output` at the positions that predict response tokens, [n, h], on every TP rank.

    Under sequence parallelism the shards are gathered once; backward reduce-scatters the gradient, of which each rank
    then provides its part (`hidden_grad_reduction`).
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return hidden.squeeze(1)[batch.logit_positions]


def hidden_grad_reduction(model: ModelChunks) -> Literal["all_reduce", "partial"]:
    """Return how the gradient of `response_hidden_states` is given: summed over TP ranks, or this rank's part."""
    return "partial" if model.config.sequence_parallel else "all_reduce"


def output_weight(model: ModelChunks) -> torch.nn.Parameter:
    """Return this rank's rows of the output layer, [vocab/tp, h], on the last pipeline stage; the embedding's if tied.

    Waits for an overlapped parameter gather, since the loss reads the weight without running the layer's forward.
    """
    gpt = unwrap_gpt(model)
    if gpt.share_embeddings_and_output_weights:
        return wait_param_gather(gpt.shared_embedding_or_output_weight())
    return wait_param_gather(gpt.output_layer.weight)


def response_logits(model: ModelChunks, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits [n, vocab/tp] of `response_hidden_states`, with the gradient that these need."""
    if hidden_grad_reduction(model) == "all_reduce":
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden @ output_weight(model).T


@torch.no_grad()
def logits_in_chunks(
    hidden: torch.Tensor, weight: torch.Tensor, elements: int = LOGITS_CHUNK_ELEMENTS
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the fp32 logits [chunk, vocab/tp] of hidden states [n, h] chunk by chunk, without gradient.

    A chunk has at most `elements` logits, but at least one row; chunks are the same on every TP rank. At least one
    chunk is yielded, which may be empty.
    """
    size = max(1, elements // weight.shape[0])
    for start in range(0, max(1, len(hidden)), size):
        rows = slice(start, min(start + size, len(hidden)))
        logits = hidden.new_empty(rows.stop - start, weight.shape[0], dtype=torch.float32)
        yield rows, product_into(logits, hidden[rows], weight.T)


def gather_context_parallel(batch: MicroBatch, values: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    """Return the values [count, ...] of all response tokens, given this CP rank's [n, ...]. Collective over CP."""
    if batch.cp_local_indices is None:
        return values
    gathered = values.new_zeros(batch.num_response_tokens, *values.shape[1:]).index_copy(
        0, batch.cp_local_indices, values
    )
    dist.all_reduce(gathered, group=parallel.cp_group)
    return gathered
