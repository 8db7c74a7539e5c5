"""Megatron-Core's GPTModel on this rank: its chunks, layout-independent parameter names, and overlapped gathers.

With overlap, collectives are issued in backward and in `optimizer.optimizer_step`, which every rank runs; forward only
waits for them, so ranks may run different numbers of forward passes.
"""

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
"""Compute dtype by precision, and the dtype of all weights but those in fp8 (`build_model(fp8=True)`)."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine fuses norms into the next linear layer; their names in Megatron-Core's local layers."""


def global_param_name(name: str, *, first_layer: int = 0, first_expert: int = 0) -> str:
    """Return a chunk parameter's name in the full model, independent of the layout and of Transformer Engine.

    first_layer, first_expert: indices in the full model of the chunk's layer 0 and expert 0.
    """
    for fused, own in _FUSED_NORMS.items():
        name = name.replace(fused, own)
    name = _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\3.\1.\2", name)
    name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda match: f"mlp.experts.local_experts.{int(match[1]) + first_expert}.", name)


_WAIT = "wait_for_gather"  # attribute of a parameter with an overlapped gather: a function that waits for it


def prepare_param_gather_waits(chunks: Iterable[Any]) -> None:
    """Let `wait_param_gather` find the gather of each parameter of these chunks.

    Megatron-Core waits in forward hooks of the module that holds a parameter. Code that reads a parameter without that
    module's forward (the objective reads the output layer, checkpoints read all) calls `wait_param_gather`.
    """
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)  # otherwise the first forward would start the first gather
        for parameter, group in chunk.param_to_bucket_group.items():
            setattr(parameter, _WAIT, partial(_wait, group))


def _wait(group: Any) -> None:
    if group.param_gather_handle is not None:  # otherwise Megatron-Core would start a gather on this rank alone
        group.finish_param_sync(skip_next_bucket_dispatch=True)


def wait_param_gather(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Wait for the parameter's gather, if it is overlapped, and return the parameter."""
    wait = getattr(parameter, _WAIT, None)
    if wait is not None:
        wait()
    return parameter


def wait_all_param_gathers(chunks: Iterable[torch.nn.Module]) -> None:
    """Wait for the gathers of all parameters of the chunks."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            wait_param_gather(parameter)


class ModelChunks(torch.nn.ModuleList):
    """A rank's share of a model: one GPTModel per virtual pipeline stage, bare or wrapped."""

    @property
    def gpts(self) -> list[GPTModel]:
        """The GPTModels inside data-parallel and precision wrappers, in stage order."""
        return [unwrap_gpt(chunk) for chunk in self]

    @property
    def config(self) -> Any:
        return self.gpts[0].config

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype (fp8 aside)."""
        return cast(torch.dtype, self.config.params_dtype)

    def global_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return this rank's parameters by `global_param_name`, after waiting for their gathers.

        With tied embeddings on several pipeline stages the last stage's copy is `output_layer.weight`.
        """
        parameters = {}
        for chunk in self.gpts:
            layers = get_transformer_layer_offset(chunk.config, chunk.vp_stage)
            experts = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
            first = experts * parallel_state.get_expert_model_parallel_rank() if experts else 0
            for name, parameter in chunk.named_parameters():
                global_name = global_param_name(name, first_layer=layers, first_expert=first)
                parameters[global_name] = wait_param_gather(parameter)
        return parameters

    def zero_grad_buffer(self) -> None:
        """Zero the gradient buffers of chunks from `optimizer.wrap_ddp`."""
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
    """Build this rank's chunks on its device, with uninitialised weights (`checkpoint.hf_import` loads them).

    hf            transformers' configuration
    untie         give a model with tied embeddings a separate output layer (a teacher whose output rows are mapped)
    output_vocab  vocabulary size that sets the padding and the shards of the output layer (a teacher gets the
                  student's); None: the model's own. GPTModel itself cannot run an output layer of another size
    fp8           keep the layers' weights in fp8, frozen; dtype is that of the other weights
    recompute     activations that are recomputed in backward
    """
    rows = padded_vocab_size(hf.vocab_size, layout.tensor_parallel)
    output_rows = padded_vocab_size(output_vocab or hf.vocab_size, layout.tensor_parallel)
    shared = hf.tie_word_embeddings and not untie and output_rows == rows
    config = transformer_config(
        hf,
        layout,
        dtype,
        recompute,
        engine=uses_transformer_engine(),
        layer_settings=FP8_SETTINGS if fp8 else None,
    )
    set_attention_factor(config, hf)
    stages = [None] if layout.virtual_pipeline == 1 else range(layout.virtual_pipeline)
    # with gradients enabled Transformer Engine keeps a second, transposed copy of fp8 weights
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
    """Mark expert parameters, whose gradients are summed over the ranks that hold the same experts.

    Megatron-Core marks them only under expert parallelism; with expert_tensor_parallel below tensor_parallel alone,
    each rank would keep its own part of the gradient.
    """
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def unwrap_gpt(model: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside data-parallel and precision wrappers; the last one of several chunks."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner[-1] if isinstance(inner, ModelChunks) else inner.module
    return inner
