"""The optimiser's checkpoint format, the same for every kind of optimiser, so that each loads the others'.

    optimizer.step                        completed updates (in common.pt)
    optimizer.state.exp_avg.<weight>      Adam's moments, sharded as the weight is
    optimizer.state.exp_avg_sq.<weight>
    optimizer.state.fp32_param.<weight>   main parameters, where the weights are bf16

Learning rate, weight decay, betas and eps come from the recipe and are not stored. Megatron-Core's own formats differ
between its optimisers; that of the distributed one cannot be loaded with torch's Adam, and splits states at the wrong
places where a bucket is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from eaopd_megatron.distributed.cpu_compat import cuda_as_cpu
from eaopd_megatron.megatron.offload import ADAM_MOMENTS, require_onloaded

MAIN = "fp32_param"
States = dict[str, dict[str, Any]]
"""{parameter index: {"exp_avg": ..., "exp_avg_sq": ..., "fp32_param": ...}}"""


def sharded_optimizer_state(
    optimizer: ChainedOptimizer, model: dict[str, Any], *, loading: bool = False
) -> dict[str, Any]:
    """Return the optimiser's sharded state dict, to be saved or (loading) to be filled. Collective.

    model: `sharded_state_dict(...)` of the model's chunks, whose sharding the states follow. A distributed optimiser's
    states are gathered in host memory: every data-parallel rank holds the full states of its weights.
    """
    require_onloaded(optimizer)
    tensors, _ = extract_sharded_tensors_and_factories(model)
    weights = {id(sharded.data): sharded for sharded in nested_values(tensors)}
    states = {}
    with cuda_as_cpu():
        for number, part in enumerate(optimizer.chained_optimizers):
            distributed = isinstance(part, DistributedOptimizer)
            states[str(number)] = _gathered(part, weights, loading) if distributed else _local(part, weights)
    return {"step": num_completed_steps(optimizer), "state": states}


def load_optimizer_state(optimizer: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Load the states of a `sharded_optimizer_state`; the model's weights must be loaded first."""
    with cuda_as_cpu(), torch.no_grad():
        for number, part in enumerate(optimizer.chained_optimizers):
            states = state["state"].get(str(number), {})  # empty for the experts' optimiser of a stage without experts
            if isinstance(part, DistributedOptimizer):
                _scatter(part, states)
            else:
                for place, (_, main) in enumerate(_parameters(part)):
                    for name, tensor in states[str(place)].items():
                        (main if name == MAIN else part.optimizer.state[main][name]).data.copy_(tensor)
    _set_steps(optimizer, state["step"])


def init_optimizer_states(optimizer: ChainedOptimizer) -> None:
    """Create every parameter's states (zeros) before the first update."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    _set_steps(optimizer, 0.0)


def num_completed_steps(optimizer: ChainedOptimizer) -> float:
    for part in optimizer.chained_optimizers:
        for entry in chain(part.optimizer.state.values(), part.optimizer.param_groups):
            if "step" in entry:  # of torch's Adam's states; of Transformer Engine's and Apex's groups
                return float(entry["step"])
    return 0.0


def _set_steps(optimizer: ChainedOptimizer, step: float) -> None:
    """Set the step counter of every parameter (torch's Adam) or group (Transformer Engine's and Apex's).

    Each gets a tensor of its own: a shared one would be incremented once per parameter and corrupt the bias correction.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(step))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = int(step)


def _parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Yield (weight, main parameter) of an optimiser that is not distributed; both are the weight without main ones."""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for weights, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(weights, mains, strict=True)
        for group in part.fp32_from_fp32_groups:
            yield from zip(group, group, strict=True)
    else:
        yield from ((weight, weight) for weight in part.get_parameters())


def _local(part: Any, weights: dict[int, Any]) -> States:
    states = {}
    for place, (weight, main) in enumerate(_parameters(part)):
        tensors = {name: part.optimizer.state[main][name] for name in ADAM_MOMENTS}
        if main is not weight:
            tensors[MAIN] = main
        states[str(place)] = _as_weight(tensors, weights[id(weight)])
    return states


def _as_weight(tensors: dict[str, torch.Tensor], sharded_weight: Any) -> dict[str, Any]:
    """Return tensors of a weight's shape as sharded tensors with the weight's sharding."""
    return {
        name: make_sharded_optimizer_tensor(sharded_weight, tensor, f"optimizer.state.{name}")
        for name, tensor in tensors.items()
    }


def _gathered(part: DistributedOptimizer, weights: dict[int, Any], loading: bool) -> States:
    """Gather the full states of this rank's weights from all data-parallel ranks."""
    world = part.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=loading, return_on_all_ranks=True)
    states: States = {}
    for number, buffer in enumerate(part.buffers):
        (flat,) = world[number].values()
        for weight, (start, end) in _places(buffer).items():
            names = [*ADAM_MOMENTS, "param"] if weight.dtype != torch.float32 else ADAM_MOMENTS
            tensors = {MAIN if name == "param" else name: flat[name][start:end].view(weight.shape) for name in names}
            states[str(len(states))] = _as_weight(tensors, weights[id(weight)])
    return states


def _places(buffer: Any) -> dict[torch.nn.Parameter, tuple[int, int]]:
    """Return each weight's range in a gathered buffer, from which the padding between buckets has been removed."""
    removed, length = [], 0
    for bucket in buffer.buckets:
        removed.append(bucket.offset - length)
        length += bucket.numel_unpadded
    return {w: (start - removed[b], end - removed[b]) for w, (start, end, b) in buffer.param_index_map.items()}


def _scatter(part: DistributedOptimizer, states: States) -> None:
    """Load this rank's shards of full states.

    Drops torch's step counter first, which Megatron-Core would expect among the states; `_set_steps` creates it again.
    """
    for state in part.optimizer.state.values():
        state.pop("step", None)
    whole = {}
    for place, weight in enumerate(chain.from_iterable(buffer.param_index_map for buffer in part.buffers)):
        tensors = {name: tensor for name, tensor in states[str(place)].items() if name != MAIN}
        whole[place] = {**tensors, "param": states[str(place)].get(MAIN, weight.data)}
    part.load_parameter_state_from_fully_reshardable(whole)
