"""Data-parallel gradients and AdamW, both Megatron-Core's, from zeroed gradients to one update."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from eaopd_megatron.megatron.cpu import cuda_literals
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.megatron.model import ModelChunks


def wrap(model: ModelChunks, parallel: Parallel) -> ModelChunks:
    """The model's chunks, each with one fp32 gradient buffer that sums over micro-batches and, at last, over ranks.

    All data-parallel ranks start from the weights of the first.
    """
    if not model.config.calculate_per_token_loss:
        raise ValueError("calculate_per_token_loss must be set before wrap: gradients would be divided by the ranks")
    _mark_shards(model)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    with cuda_literals():
        wrapped = [DistributedDataParallel(model.config, settings, chunk) for chunk in model]
        for ddp in wrapped:
            ddp.broadcast_params()
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
) -> ChainedOptimizer:
    """AdamW with decoupled weight decay on every parameter; bf16 weights have fp32 main parameters.

    clip_grad: largest norm of the whole gradient; 0 leaves it as it is. The states exist from the start (zeros), so a
    checkpoint can be written before the first update.
    """
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
    )
    with cuda_literals():
        # no overrides: Megatron's own except the norms' weights from decay, which only its scheduler would carry out
        optimizer = get_megatron_optimizer(config, list(model), config_overrides={}, use_gloo_process_groups=False)
    _complete_states(optimizer)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter; the only place that does after the optimiser was built."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def finish_gradients(model: ModelChunks, num_tokens: torch.Tensor) -> None:
    """Gradients of a loss summed over tokens → the gradient of its mean over the tokens of all data-parallel ranks.

    num_tokens (one element of any number type; unchanged): this rank's tokens in the update, equal on the ranks of a
    tensor-parallel group; 0 is allowed. Sums over data-parallel ranks and, for the norms' weights, over tensor-parallel
    ranks (query and key norms always, the others under sequence parallelism). Collective.
    """
    device = next(model.parameters()).device
    total = torch.tensor(float(num_tokens), dtype=torch.float64, device=device)
    with cuda_literals():
        finalize_model_grads(list(model), total)


def step(optimizer: ChainedOptimizer) -> tuple[bool, float]:
    """Clip and update. Returns (updated, norm of the whole gradient before clipping), the same on every rank.

    Before the next backward both `ddp.zero_grad_buffer()` and `optimizer.zero_grad()` are needed: in fp32 each `.grad`
    is left as a part of the buffer, and gradients would be counted twice.

    A norm that is not finite changes no weight and gives False. Collective.
    """
    with cuda_literals(), torch.no_grad():
        overflow = optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if overflow or not math.isfinite(norm):
            return False, norm
        for part in optimizer.chained_optimizers:
            if part.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
        return bool(optimizer.step_with_ready_grads()), norm


def sharded_state(optimizer: ChainedOptimizer, model: dict[str, Any], *, loading: bool = False) -> dict[str, Any]:
    """The optimiser's sharded state dict, to be saved or (loading) to be filled.

    model: `sharded_state_dict(...)` of the model, which tells how the states are cut.
    """
    with cuda_literals():
        return optimizer.sharded_state_dict(model, is_loading=loading)


def load_state(optimizer: ChainedOptimizer, state: dict[Any, Any]) -> None:
    """Take the states (and a bf16 model's main parameters) of a loaded `sharded_state`.

    Learning rate, weight decay, betas and eps stay those that the optimiser has now, not the checkpoint's.
    """
    parts = optimizer.chained_optimizers
    for part, saved in zip(parts, [state] if len(parts) == 1 else [state[i] for i in range(len(parts))], strict=True):
        if isinstance(part.optimizer, torch.optim.AdamW):  # Megatron-Core saves no step where there was no update yet
            saved.get("optimizer", saved)["state"].setdefault("common_step", torch.tensor(0.0))
    options = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in optimizer.param_groups]
    with cuda_literals():
        optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, options, strict=True):
        group.update(kept)
    _complete_states(optimizer)


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


def _complete_states(optimizer: ChainedOptimizer) -> None:
    """Give every parameter of torch's AdamW a whole state of its own; what is missing is zero.

    A step counter shared by parameters would be raised once for each of them, and the bias correction silently wrong.
    """
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)
