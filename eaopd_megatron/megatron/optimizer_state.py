"""The optimiser's checkpoint format, the same for every kind of optimiser, so that each loads the others'.

    optimizer.step                        completed updates (in common.pt)
    optimizer.state.exp_avg.<weight>      Adam's moments, sharded as the weight is
    optimizer.state.exp_avg_sq.<weight>
    optimizer.state.fp32_param.<weight>   main parameters, where the weights are bf16

Learning rate, weight decay, betas and eps come from the recipe and are not stored. Megatron-Core's own formats differ
between its optimisers, or gather a distributed one's states. Here each rank writes and reads its own part of them: a
range of a flattened weight, which is at most a few boxes of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from eaopd_megatron.distributed.cpu_compat import cuda_as_cpu
from eaopd_megatron.megatron.offload import ADAM_MOMENTS, require_onloaded

MAIN = "fp32_param"
States = dict[str, dict[str, Any]]
"""{parameter index: {"exp_avg": ..., "exp_avg_sq": ..., "fp32_param": ...}}; distributed: {"0": box, "1": ...} each"""


def sharded_optimizer_state(optimizer: ChainedOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Return the optimiser's sharded state dict, to be saved or to be filled: views of its states, copied nowhere.

    model: `sharded_state_dict(...)` of the model's chunks, whose sharding the states follow.
    """
    require_onloaded(optimizer)
    tensors, _ = extract_sharded_tensors_and_factories(model)
    weights = {id(sharded.data): sharded for sharded in nested_values(tensors)}
    states = {}
    for number, part in enumerate(optimizer.chained_optimizers):
        states[str(number)] = (_boxes if isinstance(part, DistributedOptimizer) else _local)(part, weights)
    return {"step": num_completed_steps(optimizer), "state": states}


def load_optimizer_state(optimizer: ChainedOptimizer, state: dict[str, Any]) -> None:
    """Load the states of a `sharded_optimizer_state`; the model's weights must be loaded first."""
    with cuda_as_cpu(), torch.no_grad():
        for number, part in enumerate(optimizer.chained_optimizers):
            states = state["state"].get(str(number), {})  # empty for the experts' optimiser of a stage without experts
            if isinstance(part, DistributedOptimizer):
                _fill_boxes(part, states)
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


def _shards(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]]:
    """Yield each weight of which this rank updates a part, the part's start in the flattened weight, and its states.

    An fp32 weight has no main parameter: it is its own.
    """
    for ranges in part.gbuf_ranges:
        for bucket in chain.from_iterable(ranges.values()):
            for weight, found in bucket["param_map"].items():
                tensors = part._get_main_param_and_optimizer_states(weight)
                states = {name: tensors[name] for name in ADAM_MOMENTS}
                if weight.dtype != torch.float32:
                    states[MAIN] = tensors["param"]
                yield weight, found["param"].start, states


def _boxes(part: DistributedOptimizer, weights: dict[int, Any]) -> States:
    """Return this rank's states as boxes of their weights."""
    states: States = {}
    for weight, start, tensors in _shards(part):
        states[str(len(states))] = {
            name: {str(number): box for number, box in enumerate(_boxes_of(tensor, name, start, weights[id(weight)]))}
            for name, tensor in tensors.items()
        }
    return states


def _boxes_of(tensor: torch.Tensor, name: str, start: int, sharded_weight: Any) -> Iterator[ShardedTensor]:
    """Yield the boxes that a state [n] is of a weight, in order; the first element is number `start` of the weight.

    A weight whose halves are sharded one by one (gate and up) is a factory of several sharded tensors.
    """
    is_factory = isinstance(sharded_weight, ShardedTensorFactory)
    halves = nested_values(sharded_weight.build()) if is_factory else [sharded_weight]
    first = 0  # element of the weight on this tensor-parallel rank
    for half in halves:
        length, axes = math.prod(half.local_shape), half.prepend_axis_num
        inside = slice(max(0, start - first), min(length, start + len(tensor) - first))
        taken = max(0, first - start)
        for offset, shape in boxes_of_range(half.local_shape, inside.start, inside.stop):
            data = tensor[taken : taken + math.prod(shape)].view((1,) * axes + shape)
            taken += math.prod(shape)
            yield replace(
                half,
                key=f"optimizer.state.{name}.{half.key}",
                data=data,
                dtype=data.dtype,
                local_shape=tuple(data.shape),
                global_offset=tuple(a + b for a, b in zip(half.global_offset, (0,) * axes + offset, strict=True)),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*half.replica_id[:2], 0),  # no other data-parallel rank has it
                prepend_axis_num=0,
            )
        first += length


def boxes_of_range(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and shape of the fewest boxes that are elements start to end of a flattened tensor, in their order.

    At most 2·dimensions − 1 of them.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # the range begins and ends inside one row
        pieces = [(last, start - last * row, end - last * row)]
    else:
        pieces = [(first - 1, start - (first - 1) * row, row)] if start % row else []
    for index, low, high in pieces:
        for offset, size in boxes_of_range(shape[1:], low, high):
            yield (index, *offset), (1, *size)
    if first > last:
        return
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    for offset, size in boxes_of_range(shape[1:], 0, end - last * row):
        yield (last, *offset), (1, *size)


def _fill_boxes(part: DistributedOptimizer, states: States) -> None:
    """Copy loaded boxes into this rank's states."""
    for place, (_, _, tensors) in enumerate(_shards(part)):
        for name, tensor in tensors.items():
            boxes = states[str(place)][name]
            tensor.copy_(torch.cat([boxes[str(number)].flatten() for number in range(len(boxes))]))
