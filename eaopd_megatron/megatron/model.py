"""A Hugging Face configuration → Megatron-Core's GPTModel on this rank's shard."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron import cpu
from eaopd_megatron.megatron.groups import Layout
from eaopd_megatron.megatron.layers import layer_spec

VOCAB_DIVISOR = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of 128 · tensor_parallel (Megatron's rule).

    151,936 stays at tensor_parallel 1 and becomes 152,064 at 2 and 152,064 at 4.
    """
    multiple = VOCAB_DIVISOR * tensor_parallel
    return (vocab_size + multiple - 1) // multiple * multiple


def check_config(hf: Any, layout: Layout, folder: str) -> None:
    """Refuse, before anything is allocated, a model that this version or this layout cannot hold (UserError)."""
    rope = getattr(hf, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{folder}: rope_type {rope['rope_type']!r} is not supported; supported: default")
    if getattr(hf, "use_sliding_window", False):
        raise UserError(f"{folder}: sliding-window attention is not supported; set use_sliding_window to false")
    if getattr(hf, "attention_bias", False):
        raise UserError(f"{folder}: attention_bias is not supported")
    if hf.hidden_act != "silu":
        raise UserError(f"{folder}: hidden_act {hf.hidden_act!r} is not supported; supported: silu")
    tp = layout.tensor_parallel
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, name) % tp:
            raise UserError(f"{folder}: tensor_parallel={tp} does not divide {name}={getattr(hf, name)}")


def transformer_config(hf: Any, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-Core's configuration of a Qwen3 model at this layout; no dropout, losses summed per token."""
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        ffn_hidden_size=hf.intermediate_size,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        sequence_parallel=layout.sequence_parallel and layout.tensor_parallel > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every parameter is loaded; the import checks that none is left out
        calculate_per_token_loss=True,  # before DDP is built, or gradients come out divided by the data-parallel size
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def build_model(hf: Any, layout: Layout, dtype: torch.dtype, *, untie: bool = False) -> GPTModel:
    """An uninitialised GPTModel of this rank's shard, on its device; weights come from `checkpoint.hf_import`.

    untie: give a model with tied embeddings an output layer of its own (a teacher whose output rows are mapped).
    """
    config = transformer_config(hf, layout, dtype)
    with cpu.cuda_literals():
        model = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(config),
            vocab_size=padded_vocab_size(hf.vocab_size, layout.tensor_parallel),
            max_sequence_length=hf.max_position_embeddings,
            parallel_output=True,
            share_embeddings_and_output_weights=hf.tie_word_embeddings and not untie,
            position_embedding_type="rope",
            rotary_base=int(hf.rope_parameters["rope_theta"]),
        )
    if torch.cuda.is_available():
        model = model.cuda()
    return model.to(dtype)


def logits_of(model: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, V_padded/tp] of right-padded token_ids [b, s]; causality keeps the padding out of what precedes it.

    Under sequence parallelism s must be a multiple of the tensor-parallel size.
    """
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    return model(input_ids=token_ids, position_ids=positions, attention_mask=None)


def hidden_of(model: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [b, s, h] after the final norm, of right-padded token_ids [b, s]; the output layer is not run.

    The same on every tensor-parallel rank. Under sequence parallelism they are gathered once, and in backward the
    gradient is reduce-scattered: each rank then gives its part of it (`hidden_grad(model)`).
    """
    gpt = gpt_of(model)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)
    gpt.post_process = False  # GPTModel returns what it would give to its output layer
    try:
        hidden = model(input_ids=token_ids, position_ids=positions, attention_mask=None)
    finally:
        gpt.post_process = True
    if gpt.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    return hidden.transpose(0, 1)


def hidden_rows(model: torch.nn.Module, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`hidden_of` at some rows [n] of the flattened [b·s] positions: [n, h]."""
    return hidden_of(model, token_ids).flatten(0, 1)[rows]


@torch.no_grad()
def logits_by_rows(
    model: torch.nn.Module, token_ids: torch.Tensor, rows: torch.Tensor, elements: int = 2**27
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Logits [part, V_padded/tp] of some rows [n] of the flattened [b·s] positions, a part at a time, without gradient.

    The parts are the same on every tensor-parallel rank; one part has at most `elements` logits, and at least one row.
    """
    hidden, head = hidden_rows(model, token_ids, rows), head_of(model)
    size = max(1, elements // head.shape[0])
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield part, hidden[part] @ head.T


def hidden_grad(model: torch.nn.Module) -> Literal["all_reduce", "partial"]:
    """What `hidden_of`'s gradient must be: the whole one, or this rank's part, which its gather sums."""
    return "partial" if gpt_of(model).config.sequence_parallel else "all_reduce"


def head_of(model: torch.nn.Module) -> torch.nn.Parameter:
    """This rank's rows of the output layer [V_padded/tp, h]: the embedding's where they are tied."""
    gpt = gpt_of(model)
    if gpt.share_embeddings_and_output_weights:
        return gpt.shared_embedding_or_output_weight()
    return gpt.output_layer.weight


def gpt_of(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside data-parallel and precision wrappers."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner.module
    return inner


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
