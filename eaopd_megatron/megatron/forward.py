"""One forward pass: token ids → hidden states or logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from eaopd_megatron.megatron.model import ModelChunks, gpt_of
from eaopd_megatron.megatron.overlap import gathered


def logits_of(model: ModelChunks, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, V_padded/tp] of right-padded token_ids [b, s]; causality keeps the padding out of what precedes it.

    Under sequence parallelism s must be a multiple of the tensor-parallel size.
    """
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    return model[-1](input_ids=token_ids, position_ids=positions, attention_mask=None)


def hidden_of(model: ModelChunks, token_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [b, s, h] after the final norm, of right-padded token_ids [b, s]; the output layer is not run.

    The same on every tensor-parallel rank. Under sequence parallelism they are gathered once, and in backward the
    gradient is reduce-scattered: each rank then gives its part of it (`hidden_grad(model)`).
    """
    gpt = gpt_of(model)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    gpt.post_process = False  # GPTModel returns what it would give to its output layer
    try:
        hidden = model[-1](input_ids=token_ids, position_ids=positions, attention_mask=None)
    finally:
        gpt.post_process = True
    if gpt.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return hidden.transpose(0, 1)


def hidden_rows(model: ModelChunks, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`hidden_of` at some rows [n] of the flattened [b·s] positions: [n, h]."""
    return hidden_of(model, token_ids).flatten(0, 1)[rows]


@torch.no_grad()
def logits_by_rows(
    model: ModelChunks, token_ids: torch.Tensor, rows: torch.Tensor, elements: int = 2**27
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits [part, V_padded/tp] of some rows [n] of the flattened [b·s] positions, a part at a time, without gradient.

    The parts are the same on every tensor-parallel rank; one part has at most `elements` logits, and at least one row.
    """
    hidden, head = hidden_rows(model, token_ids, rows), head_of(model)
    size = max(1, elements // head.shape[0])
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield part, hidden[part] @ head.T


def hidden_grad(model: ModelChunks) -> Literal["all_reduce", "partial"]:
    """What `hidden_of`'s gradient must be: the whole one, or this rank's part, which its gather sums."""
    return "partial" if gpt_of(model).config.sequence_parallel else "all_reduce"


def head_of(model: ModelChunks) -> torch.nn.Parameter:
    """This rank's rows of the output layer [V_padded/tp, h]: the embedding's where they are tied.

    Where gathers of updated weights are overlapped it waits for this one: no module's forward does it for the loss.
    """
    gpt = gpt_of(model)
    if gpt.share_embeddings_and_output_weights:
        return gathered(gpt.shared_embedding_or_output_weight())
    return gathered(gpt.output_layer.weight)


@contextlib.contextmanager
def without_sequence_parallel(model: GPTModel) -> Iterator[None]:
    """Decoding feeds one position at a time, which sequence parallelism cannot cut."""
    if not model.config.sequence_parallel:
        yield
        return
    set_model_to_sequence_parallel(model, False)
    try:
        yield
    finally:
        set_model_to_sequence_parallel(model, True)
