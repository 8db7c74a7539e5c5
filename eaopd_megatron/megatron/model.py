"""Megatron-Core's GPTModel on this rank: the chunks that it holds, and their parameters under global names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from eaopd_megatron.distributed import cpu_compat as cpu
from eaopd_megatron.distributed.parallel_state import ParallelLayout
from eaopd_megatron.megatron.layers import layer_spec, take_any_length
from eaopd_megatron.megatron.overlap import gathered
from eaopd_megatron.megatron.param_names import global_name
from eaopd_megatron.models.architecture import Recompute, padded_vocab_size, transformer_config
from eaopd_megatron.models.rotary import rotary_base, set_attention_factor, set_frequencies

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of what is computed, and of weights but fp8's (`build_model(..., fp8=True)`)."""


class ModelChunks(torch.nn.ModuleList):
    """What a rank holds of a model: one GPTModel, or one for each virtual pipeline stage, bare or wrapped."""

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        super().__init__(chunks)

    @property
    def gpts(self) -> list[GPTModel]:
        """The GPTModels inside data-parallel and precision wrappers, first stage first."""
        return [gpt_of(chunk) for chunk in self]

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
                found[global_name(name, first_layer=layers, first_expert=first)] = gathered(parameter)
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
    config = transformer_config(hf, layout, dtype, recompute, fp8=fp8)
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
            take_any_length(gpt)
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


def gpt_of(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside data-parallel and precision wrappers; of several chunks the last one."""
    inner: Any = model
    while not isinstance(inner, GPTModel):
        inner = inner[-1] if isinstance(inner, ModelChunks) else inner.module
    return inner
