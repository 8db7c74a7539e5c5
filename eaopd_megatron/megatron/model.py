"""Megatron-Core's GPTModel on this rank: the chunks that it holds, and their parameters under global names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from eaopd_megatron.config.parallel import ParallelLayout, Recompute
from eaopd_megatron.distributed import cpu_compat as cpu
from eaopd_megatron.megatron.layers import FP8_SETTINGS, layer_spec, pad_fp8_inputs, uses_transformer_engine
from eaopd_megatron.models.shapes import padded_vocab_size
from eaopd_megatron.models.transformer_config import (
    rotary_base,
    set_attention_factor,
    set_frequencies,
    transformer_config,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of what is computed, and of weights but fp8's (`build_model(..., fp8=True)`)."""


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's layers that hold the norm of their input, and the norm's name in Megatron's local layers."""


def global_param_name(name: str, *, first_layer: int = 0, first_expert: int = 0) -> str:
    """The name in the whole model of a chunk's parameter, as Megatron's local layers would call it.

    first_layer, first_expert: numbers, in the whole model, of the chunk's layer 0 and expert 0.
    """
    for fused, own in _FUSED_NORMS.items():
        name = name.replace(fused, own)
    name = _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\3.\1.\2", name)
    name = _LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda found: f"mlp.experts.local_experts.{int(found[1]) + first_expert}.", name)


_WAIT = "wait_for_gather"
"""The attribute of a parameter whose gather may be under way: waits until it has ended."""


def prepare_param_gather_waits(chunks: Iterable[Any]) -> None:
    """Let each parameter of chunks with overlapped gathers know how to wait for its own.

    Megatron-Core waits in hooks before the forward of the module that holds a parameter. Who reads a parameter without
    that module (the objective reads the output layer, a checkpoint all) calls `wait_param_gather`.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)  # or the first forward would start the first gather
        for parameter, group in chunk.param_to_bucket_group.items():
            setattr(parameter, _WAIT, partial(_wait, group))


def _wait(group: Any) -> None:
    if group.param_gather_handle is not None:  # else Megatron-Core would start a gather of this rank's own
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def wait_param_gather(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The parameter, once its gather has ended."""
    wait = getattr(parameter, _WAIT, None)
    if wait is not None:
        wait()
    return parameter


def start_param_gathers(chunks: Iterable[Any]) -> None:
    """Begin to gather the weights that other ranks updated, where that is overlapped. Collective."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()


def wait_all_param_gathers(chunks: Iterable[torch.nn.Module]) -> None:
    """Wait until every parameter of the chunks is whole."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            wait_param_gather(parameter)


class ModelChunks(torch.nn.ModuleList):
    """What a rank holds of a model: one GPTModel, or one for each virtual pipeline stage, bare or wrapped."""

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        super().__init__(chunks)

    @property
    def gpts(self) -> list[GPTModel]:
        """The GPTModels inside data-parallel and precision wrappers, first stage first."""
        return [unwrap_gpt(chunk) for chunk in self]

    @property
    def config(self) -> Any:
        """Megatron-Core's TransformerConfig."""
        return self.gpts[0].config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return cast(torch.dtype, self.config.params_dtype)

    def global_parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by names that no layout changes: layers and experts have their numbers in the model.

        Waits for those that are being gathered. Tied embeddings over pipeline stages: the last stage's copy is
        `output_layer.weight`.
        """
        found = {}
        for chunk in self.gpts:
            layers = get_transformer_layer_offset(chunk.config, chunk.vp_stage)
            experts = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
            first = experts * parallel_state.get_expert_model_parallel_rank() if experts else 0
            for name, parameter in chunk.named_parameters():
                found[global_param_name(name, first_layer=layers, first_expert=first)] = wait_param_gather(parameter)
        return found

    def zero_grad_buffer(self) -> None:
        """Zero the gradient buffers of chunks that `optimizer.wrap` made."""
        for chunk in self:
            cast(Any, chunk).zero_grad_buffer()


def build_model(
    hf: Any,
    layout: ParallelLayout,
    dtype: torch.dtype,
    *,
    untie: bool = False,
    output_vocab: int | None = None,
    fp8: bool = False,
    recompute: Recompute = "none",
) -> ModelChunks:
    """This rank's uninitialised part of a model, on its device; weights come from `checkpoint.hf_import`.

    untie: give a model with tied embeddings an output layer of its own (a teacher whose output rows are mapped).
    output_vocab: the vocabulary size whose padding and shards the output layer has (a teacher's: the student's), which
    makes a difference where the embedding's are others; none: the model's own. GPTModel cannot run such a layer.
    fp8: the layers' weights, which are frozen then (`megatron.fp8`); dtype is the others'.
    recompute: activations that backward makes again instead of keeping them.
    """
    rows = padded_vocab_size(hf.vocab_size, layout.tensor_parallel)
    output_rows = padded_vocab_size(output_vocab or hf.vocab_size, layout.tensor_parallel)
    shared = hf.tie_word_embeddings and not untie and output_rows == rows
    config = transformer_config(
        hf,
        layout,
        dtype,
        recompute,
        grouped_gemm=uses_transformer_engine(),
        layer_settings=FP8_SETTINGS if fp8 else None,
    )
    set_attention_factor(config, hf)
    stages = [None] if layout.virtual_pipeline == 1 else range(layout.virtual_pipeline)
    # with gradients Transformer Engine keeps a second, transposed copy of weights in fp8
    with cpu.cuda_as_cpu(), torch.set_grad_enabled(torch.is_grad_enabled() and not fp8):
        chunks = [
            GPTModel(
                config=config,
                transformer_layer_spec=layer_spec(config, stage),
                vocab_size=rows,
                max_sequence_length=hf.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                parallel_output=True,
                share_embeddings_and_output_weights=shared,
                position_embedding_type="rope",
                rotary_base=rotary_base(hf),
                vp_stage=stage,
            )
            for stage in stages
        ]
    model = ModelChunks(chunks)
    for gpt in chunks:
        set_frequencies(gpt, hf)
        _mark_experts(gpt)
        if fp8:
            pad_fp8_inputs(gpt)
        if gpt.post_process and output_rows != rows:
            weight = gpt.output_layer.weight
            resized = weight.new_empty(output_rows // layout.tensor_parallel, weight.shape[1])
            gpt.output_layer.weight = torch.nn.Parameter(resized)
    if torch.cuda.is_available():
        model = model.cuda()
    return model.to(dtype)


def _mark_experts(gpt: GPTModel) -> None:
    """Say which parameters are experts', so that their gradients are summed over the ranks that hold the same experts.

    Megatron-Core's layers do it with expert parallelism only; experts that are not cut as the other layers are
    (expert_tensor_parallel below tensor_parallel) would keep each rank's own part of the gradient.
    """
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def unwrap_gpt(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside data-parallel and precision wrappers; of several chunks the last one."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner[-1] if isinstance(inner, ModelChunks) else inner.module
    return inner
