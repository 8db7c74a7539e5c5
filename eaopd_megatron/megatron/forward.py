"""One model chunk's forward pass over packed sequences, and what is made of the last stage's hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from eaopd_megatron.data.types import MicroBatch
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.layers import PackedSequences
from eaopd_megatron.megatron.model import ModelChunks, unwrap_gpt, wait_param_gather
from eaopd_megatron.objective.settings import LOGITS_CHUNK_ELEMENTS


def stage_output(chunk: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """What a chunk, bare or wrapped, gives to the next stage; from the last one the hidden states after the final norm
    [T, 1, h] (under sequence parallelism this rank's part of the T tokens). The output layer is not run."""
    gpt = unwrap_gpt(chunk)
    last, gpt.post_process = gpt.post_process, False  # GPTModel returns what it would give to its output layer
    try:
        return chunk(
            input_ids=batch.token_ids,
            position_ids=batch.positions,
            attention_mask=None,
            packed_seq_params=PackedSequences.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen),
        )
    finally:
        gpt.post_process = last


def response_hidden_states(model: ModelChunks, hidden: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """The last stage's `stage_output` at the micro-batch's rows: [n, h], the same on every tensor-parallel rank.

    Under sequence parallelism the parts are gathered once, and in backward the gradient is reduce-scattered: each rank
    then gives its part of it (`hidden_grad_reduction(model)`).
    """
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return hidden.squeeze(1)[batch.logit_positions]


def hidden_grad_reduction(model: ModelChunks) -> Literal["all_reduce", "partial"]:
    """Return how the gradient of `response_hidden_states` is given: summed over TP ranks, or this rank's part."""
    return "partial" if model.config.sequence_parallel else "all_reduce"


def output_weight(model: ModelChunks) -> torch.nn.Parameter:
    """This rank's rows of the output layer [V_padded/tp, h], on the last pipeline stage: the embedding's where they are
    tied.

    Where gathers of updated weights are overlapped it waits for this one: no module's forward does it for the loss.
    """
    gpt = unwrap_gpt(model)
    if gpt.share_embeddings_and_output_weights:
        return wait_param_gather(gpt.shared_embedding_or_output_weight())
    return wait_param_gather(gpt.output_layer.weight)


def response_logits(model: ModelChunks, rows: torch.Tensor) -> torch.Tensor:
    """Logits [n, V_padded/tp] of `response_hidden_states`, with the gradient that it must have."""
    if hidden_grad_reduction(model) == "all_reduce":
        rows = copy_to_tensor_model_parallel_region(rows)
    return rows @ output_weight(model).T


@torch.no_grad()
def logits_in_chunks(
    rows: torch.Tensor, head: torch.Tensor, elements: int = LOGITS_CHUNK_ELEMENTS
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits [part, V_padded/tp] of rows [n, h] under head [V_padded/tp, h], a part at a time, without gradient.

    The parts are the same on every tensor-parallel rank; one part has at most `elements` logits, and at least one row.
    There is one part at least, which may be empty.
    """
    size = max(1, elements // head.shape[0])
    for start in range(0, max(1, len(rows)), size):
        part = slice(start, start + size)
        yield part, rows[part] @ head.T


def gather_context_parallel(batch: MicroBatch, values: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    """Values [n, ...] of this rank's rows → [count, ...] of all response tokens. Collective over context-parallel
    ranks."""
    if batch.cp_local_indices is None:
        return values
    everything = values.new_zeros(batch.num_response_tokens, *values.shape[1:]).index_copy(
        0, batch.cp_local_indices, values
    )
    dist.all_reduce(everything, group=parallel.cp_group)
    return everything
