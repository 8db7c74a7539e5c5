"""Megatron-Core's data-parallel gradient buffers and AdamW, from zeroed gradients to one update."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.distributed.cpu_compat import cuda_as_cpu
from eaopd_megatron.megatron.model import ModelChunks, prepare_param_gather_waits, wait_all_param_gathers
from eaopd_megatron.megatron.offload import offload_moments_between_steps
from eaopd_megatron.megatron.optimizer_state import init_optimizer_states


def wrap_ddp(
    model: ModelChunks, *, distributed: bool = False, overlap: bool = False, bucket_size: int | None = None
) -> ModelChunks:
    """Wrap each chunk with an fp32 gradient buffer, summed over micro-batches and finally over data-parallel ranks.

    Broadcasts the first data-parallel rank's weights.

    distributed  distributed optimizer: each data-parallel rank updates a shard of the weights and gathers the others
    overlap      (needs distributed) reduce gradients during the last micro-batch's backward (the chunks'
                 `no_sync` defers it in the others), and gather weights while the next forward begins
    bucket_size  parameters per bucket; None: Megatron-Core's choice
    """
    if not model.config.calculate_per_token_loss:
        raise ValueError("calculate_per_token_loss must be set before wrap_ddp, or gradients are divided by the ranks")
    if overlap and not distributed:
        raise ValueError("overlap needs distributed")
    _mark_shards(model)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        align_param_gather=overlap,  # `optimizer_step` alone starts gathers; forward only waits
        bucket_size=bucket_size,
    )
    with cuda_as_cpu():
        wrapped = [
            DistributedDataParallel(model.config, settings, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(model)
        ]
        for ddp in wrapped:
            ddp.broadcast_params()
    if overlap:
        prepare_param_gather_waits(wrapped)
    return ModelChunks(wrapped)


def build_optimizer(model: ModelChunks, options: OptimizerConfig) -> ChainedOptimizer:
    """Build AdamW with weight decay on every parameter, and fp32 main parameters of bf16 weights.

    model: chunks from `wrap_ddp`, which determines whether states are distributed. States exist from the start (zeros),
    so that a checkpoint can be written before the first update.
    """
    settings = cast(Any, model[0]).ddp_config
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        adam_eps=options.eps,
        decoupled_weight_decay=True,
        clip_grad=options.clip_grad,
        bf16=model.dtype == torch.bfloat16,
        params_dtype=model.dtype,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    with cuda_as_cpu():
        # no overrides: Megatron-Core's exempt norms from decay, which only its own scheduler would apply
        optimizer = get_megatron_optimizer(config, list(model), config_overrides={}, use_gloo_process_groups=False)
    init_optimizer_states(optimizer)
    if options.offload == "moments":
        for part in optimizer.chained_optimizers:
            offload_moments_between_steps(part.optimizer)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups; nothing else changes it after `build_optimizer`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def finalize_gradients(model: ModelChunks, num_tokens: torch.Tensor) -> None:
    """Turn gradients of a loss summed over tokens into the gradient of its mean over all data-parallel ranks' tokens.

    num_tokens: one element, this rank's tokens in the update, equal on all TP ranks; may be 0. Gradients of norms are
    also summed over TP ranks (query and key norms always, others under sequence parallelism). Collective.
    """
    device = next(model.parameters()).device
    total = torch.tensor(float(num_tokens), dtype=torch.float64, device=device)
    wait_all_param_gathers(model)  # the update writes where a gather may still read
    with cuda_as_cpu():
        finalize_model_grads(list(model), total)


def optimizer_step(optimizer: ChainedOptimizer) -> tuple[bool, float]:
    """Clip and update. Returns (updated, global gradient norm before clipping), equal on every rank. Collective.

    A norm that is not finite leaves the weights unchanged and returns False. Call both `ddp.zero_grad_buffer()` and
    `optimizer.zero_grad()` before the next backward: in fp32 `.grad` stays a view of the buffer, and gradients would be
    counted twice.
    """
    with cuda_as_cpu(), torch.no_grad():
        overflow = optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        updated = not overflow and math.isfinite(norm)
        if updated:
            for part in optimizer.chained_optimizers:
                if part.config.clip_grad > 0:
                    clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
            updated = bool(optimizer.step_with_ready_grads())
    for chunk in optimizer.model_chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()  # gathers the weights that other ranks updated
    return updated, norm


def _mark_shards(model: ModelChunks) -> None:
    """Mark sharded parameters, so that the gradient norm includes the shards of all tensor-parallel ranks.

    Megatron-Core marks them when it initialises weights, which our models skip.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)) and weight is not None:
            weight.tensor_model_parallel = True
            weight.partition_dim = 1 if isinstance(module, RowParallelLinear) else 0
            weight.partition_stride = 1
