"""Data-parallel gradients and AdamW, both Megatron-Core's, from zeroed gradients to one update."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from eaopd_megatron.distributed.cpu_compat import cuda_as_cpu
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.model import (
    ModelChunks,
    prepare_param_gather_waits,
    start_param_gathers,
    wait_all_param_gathers,
)
from eaopd_megatron.megatron.offload import offload_moments_between_steps
from eaopd_megatron.megatron.optimizer_state import init_optimizer_states


def wrap_ddp(
    model: ModelChunks,
    parallel: ParallelState,
    *,
    distributed: bool = False,
    overlap: bool = False,
    bucket_size: int | None = None,
) -> ModelChunks:
    """The model's chunks, each with one fp32 gradient buffer that sums over micro-batches and, at last, over ranks.

    All data-parallel ranks start from the weights of the first. distributed: each of them will hold and update a part
    of the weights, and gather the others'. overlap (needs distributed): gradients are reduced during the last
    micro-batch's backward (the chunks' `no_sync` holds it back in the others'), weights gathered while the next forward
    begins, in buckets of about bucket_size parameters (none: as Megatron-Core chooses).
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
        align_param_gather=overlap,  # gathers are started by `optimizer_step` alone: a forward only waits
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


def build_optimizer(
    model: ModelChunks,
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip_grad: float,
    precision: Literal["fp32", "bf16"],
    offload: Literal["none", "moments"] = "none",
) -> ChainedOptimizer:
    """AdamW with decoupled weight decay on every parameter; bf16 weights have fp32 main parameters.

    clip_grad: largest norm of the whole gradient; 0 leaves it as it is. The states exist from the start (zeros), so a
    checkpoint can be written before the first update. Whether they are distributed was said to `wrap_ddp`.
    offload: "moments" keeps Adam's moments in host memory between updates.
    """
    settings = cast(Any, model[0]).ddp_config
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        weight_decay=weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=eps,
        decoupled_weight_decay=True,
        clip_grad=clip_grad,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_param_gather=settings.overlap_param_gather,
    )
    with cuda_as_cpu():
        # no overrides: Megatron's own except the norms' weights from decay, which only its scheduler would carry out
        optimizer = get_megatron_optimizer(config, list(model), config_overrides={}, use_gloo_process_groups=False)
    init_optimizer_states(optimizer)
    if offload == "moments":
        for part in optimizer.chained_optimizers:
            offload_moments_between_steps(part.optimizer)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter; the only place that does after the optimiser was built."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def finalize_gradients(model: ModelChunks, num_tokens: torch.Tensor) -> None:
    """Gradients of a loss summed over tokens → the gradient of its mean over the tokens of all data-parallel ranks.

    num_tokens (one element of any number type; unchanged): this rank's tokens in the update, equal on the ranks of a
    tensor-parallel group; 0 is allowed. Sums over data-parallel ranks and, for the norms' weights, over tensor-parallel
    ranks (query and key norms always, the others under sequence parallelism). Collective.
    """
    device = next(model.parameters()).device
    total = torch.tensor(float(num_tokens), dtype=torch.float64, device=device)
    wait_all_param_gathers(model)  # the update will write where a gather may still be reading
    with cuda_as_cpu():
        finalize_model_grads(list(model), total)


def optimizer_step(optimizer: ChainedOptimizer) -> tuple[bool, float]:
    """Clip and update. Returns (updated, norm of the whole gradient before clipping), the same on every rank.

    Before the next backward both `ddp.zero_grad_buffer()` and `optimizer.zero_grad()` are needed: in fp32 each `.grad`
    is left as a part of the buffer, and gradients would be counted twice.

    A norm that is not finite changes no weight and gives False. Collective.
    """
    with cuda_as_cpu(), torch.no_grad():
        overflow = optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        done = not overflow and math.isfinite(norm)
        if done:
            for part in optimizer.chained_optimizers:
                if part.config.clip_grad > 0:
                    clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
            done = bool(optimizer.step_with_ready_grads())
    start_param_gathers(optimizer.model_chunks)
    return done, norm


def _mark_shards(model: ModelChunks) -> None:
    """Say which parameters are shards, so that the gradient's norm counts those of all tensor-parallel ranks.

    Megatron-Core does it while it initialises weights, which our models leave out.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding, RowParallelLinear)) and weight is not None:
            weight.tensor_model_parallel = True
            weight.partition_dim = 1 if isinstance(module, RowParallelLinear) else 0
            weight.partition_stride = 1
