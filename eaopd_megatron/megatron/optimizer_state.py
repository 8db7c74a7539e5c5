"""The optimiser in a checkpoint: one form for every kind of optimiser, so that any of them reads any other's.

    optimizer.step                        completed updates (in common.pt)
    optimizer.state.exp_avg.<weight>      Adam's moments, sharded as the weight is
    optimizer.state.exp_avg_sq.<weight>
    optimizer.state.fp32_param.<weight>   main parameters, where the weights are bf16

Learning rate, weight decay, betas and eps are the recipe's, and not here. Megatron-Core's own forms differ between its
optimisers; the distributed one's cannot be read where Adam is torch's, and cuts states at the wrong places where a
bucket is padded.
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
"""{number of the parameter: {"exp_avg": ..., "exp_avg_sq": ..., "fp32_param": ...}}"""


def sharded_optimizer_state(
    optimizer: ChainedOptimizer, model: dict[str, Any], *, loading: bool = False
) -> dict[str, Any]:
    """The optimiser's sharded state dict, to be saved or (loading) to be filled. Collective.

    model: `sharded_state_dict(...)` of the model's chunks, which tells how the states are cut. A distributed
    optimiser's states are gathered in host memory, whole ones of this rank's weights on each data-parallel rank.
    """
    require_onloaded(optimizer)
    found, _ = extract_sharded_tensors_and_factories(model)
    weights = {id(sharded.data): sharded for sharded in nested_values(found)}
    states = {}
    with cuda_as_cpu():
        for number, part in enumerate(optimizer.chained_optimizers):
            distributed = isinstance(part, DistributedOptimizer)
            states[str(number)] = _gathered(part, weights, loading) if distributed else _local(part, weights)
    return {"step": num_completed_steps(optimizer), "state": states}


def load_optimizer_state(optimizer: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Take the states of a loaded `sharded_optimizer_state`. The model's weights must have been loaded before."""
    with cuda_as_cpu(), torch.no_grad():
        for number, part in enumerate(optimizer.chained_optimizers):
            states = state["state"].get(str(number), {})  # a stage without experts has none of theirs
            if isinstance(part, DistributedOptimizer):
                _scatter(part, states)
            else:
                for place, (_, main) in enumerate(_parameters(part)):
                    for name, tensor in states[str(place)].items():
                        (main if name == MAIN else part.optimizer.state[main][name]).data.copy_(tensor)
    _set_steps(optimizer, state["step"])


def init_optimizer_states(optimizer: ChainedOptimizer) -> None:
    """Give every parameter a whole state of its own before the first update: zeros."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    _set_steps(optimizer, 0.0)


def num_completed_steps(optimizer: ChainedOptimizer) -> float:
    """Updates that the optimiser has made."""
    for part in optimizer.chained_optimizers:
        for entry in chain(
            part.optimizer.state.values(), part.optimizer.param_groups
        ):  # torch's Adam; Engine's, Apex's
            if "step" in entry:
                return float(entry["step"])
    return 0.0


def _set_steps(optimizer: ChainedOptimizer, step: float) -> None:
    """A counter shared by parameters would be raised once for each of them, and the bias correction silently wrong.

    Transformer Engine's and Apex's Adam count in their groups; neither has been run.
    """
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(step))
        else:
            for group in part.optimizer.param_groups:
                group["step"] = int(step)


def _parameters(part: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(weight, what the optimiser updates): the same where there are no main parameters. Not distributed."""
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
    """Tensors of a weight's shape, sharded as it is."""
    return {
        name: make_sharded_optimizer_tensor(sharded_weight, tensor, f"optimizer.state.{name}")
        for name, tensor in tensors.items()
    }


def _gathered(part: DistributedOptimizer, weights: dict[int, Any], loading: bool) -> States:
    """The whole states of this rank's weights, from all data-parallel ranks."""
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
    """Where each weight's states begin and end in a gathered buffer, which has lost the padding between buckets."""
    removed, length = [], 0
    for bucket in buffer.buckets:
        removed.append(bucket.offset - length)
        length += bucket.numel_unpadded
    return {w: (start - removed[b], end - removed[b]) for w, (start, end, b) in buffer.param_index_map.items()}


def _scatter(part: DistributedOptimizer, states: States) -> None:
    """Take this rank's parts of whole states.

    Megatron-Core would look for torch's step counter among them and fail; `_set_steps` makes it anew.
    """
    for state in part.optimizer.state.values():
        state.pop("step", None)
    whole = {}
    for place, weight in enumerate(chain.from_iterable(buffer.param_index_map for buffer in part.buffers)):
        tensors = {name: tensor for name, tensor in states[str(place)].items() if name != MAIN}
        whole[place] = {**tensors, "param": states[str(place)].get(MAIN, weight.data)}
    part.load_parameter_state_from_fully_reshardable(whole)
