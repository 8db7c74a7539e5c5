"""Checks of test_planning.py: what a plan says of a rank, against the model that Megatron-Core builds there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import AutoConfig

from eaopd_megatron.config.parallel import ParallelLayout, Recompute
from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.data.packing import collate
from eaopd_megatron.data.types import MicroBatch as Packed
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import response_hidden_states, stage_output
from eaopd_megatron.megatron.model import DTYPES, ModelChunks, build_model
from eaopd_megatron.megatron.optimizer import build_optimizer, wrap_ddp
from eaopd_megatron.megatron.pipeline import packing_for
from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.planning import memory
from eaopd_megatron.planning.activations import Activations
from eaopd_megatron.planning.workload import BYTES_PER_NUMBER, PlannedLayout, PlannedMicroBatch
from tests.distributed.groups import model_parallel as groups_at
from tests.emulated_varlen import emulated

LIMIT = 0.06  # of the saved bytes


@contextlib.contextmanager
def model_parallel(layout: dict[str, Any]) -> Iterator[tuple[ParallelState, PlannedLayout]]:
    """Megatron's groups, and the layout as a plan knows it."""
    with groups_at(ParallelLayout(**layout)) as parallel:
        yield parallel, PlannedLayout(**layout, data_parallel=parallel.dp_size)


def built(config: dict[str, Any], parallel: ParallelState, precision: str, **options: Any) -> ModelChunks:
    """A model with small random weights."""
    model = build_model(AutoConfig.for_model(**config), parallel.layout, DTYPES[precision], **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def check_parameters(group: dist.ProcessGroup, configs: list[dict[str, Any]], layout: dict[str, Any]) -> None:
    """Every rank counts what it holds, also of a teacher whose output layer has the rows of another vocabulary."""
    with model_parallel(layout) as (parallel, where):
        for config, size in itertools.product(configs, (None, 520)):
            parameters = list(built(config, parallel, "bf16", output_vocab=size).parameters())
            held = sum(p.numel() for p in parameters)
            experts = sum(p.numel() for p in parameters if not getattr(p, "allreduce", True))
            said = ModelShape.of(config).rank_parameters(where, parallel.pp_rank, size)
            assert (said.total, said.expert) == (held, experts), f"{config}, {size}, {layout}, stage {parallel.pp_rank}"


def check_training_state(
    group: dist.ProcessGroup,
    config: dict[str, Any],
    layout: dict[str, Any],
    precision: Literal["fp32", "bf16"],
    distributed: bool,
) -> None:
    """Bytes of weights, gradients and the optimiser's tensors; distributed ones over the ranks that share them."""
    with model_parallel(layout) as (parallel, where):
        ddp = wrap_ddp(built(config, parallel, precision), distributed=distributed)
        optimizer = build_optimizer(
            ddp, OptimizerConfig(lr=1, weight_decay=0, beta1=0.9, beta2=0.9, eps=1, clip_grad=0)
        )
        held = ModelShape.of(config).rank_parameters(where, parallel.pp_rank)
        assert memory.weight_bytes(held, BYTES_PER_NUMBER[precision]) == sum(p.nbytes for p in ddp.parameters())
        assert memory.gradient_bytes(held) == sum(getattr(p, "main_grad").nbytes for p in ddp.parameters())  # noqa: B009
        found = 0
        for part in optimizer.chained_optimizers:
            found += sum(t.nbytes for state in part.optimizer.state.values() for t in state.values() if t.dim())
            if precision == "bf16":
                found += sum(p.nbytes for each in part.optimizer.param_groups for p in each["params"])
        said = memory.moment_bytes(held, where, distributed=distributed)
        said += memory.main_parameter_bytes(held, where, BYTES_PER_NUMBER[precision], distributed=distributed)
        both = torch.tensor([said, found], dtype=torch.float64)
        dist.all_reduce(both, group=parallel.dp_group)
        assert both[0] == both[1], f"{precision}, distributed {distributed}: planned, held: {both.tolist()}"


def check_activations(
    group: dist.ProcessGroup,
    cases: list[tuple[dict[str, Any], list[int]]],
    layout: dict[str, Any],
    recompute: Recompute,
) -> None:
    """Bytes of the storages that autograd saves in a forward pass over packed sequences of some lengths."""
    with model_parallel(layout) as (parallel, where):
        for (config, lengths), precision in itertools.product(cases, ("fp32", "bf16")):
            model = built(config, parallel, precision, recompute=recompute).train()
            samples = [Sample(Prompt("", (1,), {}), [2] * (length - 1), "stop", [], 0) for length in lengths]
            saved = saved_bytes(model, collate(samples, parallel.device, packing_for(parallel.layout)))
            plan = Activations(ModelShape.of(config), where, BYTES_PER_NUMBER[precision], "torch", recompute)
            said = plan.of_stage(PlannedMicroBatch(sum(lengths), len(lengths) * max(lengths)), 0)
            assert abs(said / saved - 1) <= LIMIT, f"{config} {precision}: {said:.0f} planned, {saved} saved"


class FlashAttention(torch.autograd.Function):
    """What torch's kernel keeps for its backward: query, key, value, output and a sum per head and token."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.clone()
        ctx.save_for_backward(query, key, value, out, query.new_zeros(query.shape[1], len(query), dtype=torch.float32))
        return out


def check_varlen_activations(group: dist.ProcessGroup, config: dict[str, Any], lengths: list[int]) -> None:
    """The same of torch's variable-length attention, whose kernel is left out."""
    with model_parallel({}) as (parallel, where), emulated() as stands:
        stands.side_effect = lambda query, key, value, *unused, **options: FlashAttention.apply(query, key, value)
        model = built(config, parallel, "bf16").train()
        samples = [Sample(Prompt("", (1,), {}), [2] * (length - 1), "stop", [], 0) for length in lengths]
        saved = saved_bytes(model, collate(samples, parallel.device, packing_for(parallel.layout)))
        plan = Activations(ModelShape.of(config), where, 2, "varlen")
        said = plan.of_stage(PlannedMicroBatch(sum(lengths), len(lengths) * max(lengths)), 0)
        assert stands.called and abs(said / saved - 1) <= LIMIT, f"{said:.0f} planned, {saved} saved"


def saved_bytes(model: ModelChunks, batch: Packed) -> int:
    """Of unique storages, each counted once however many views of it are saved."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages themselves: an address that is freed may come again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_hidden_states(model, stage_output(model[-1], batch), batch)
    return sum(storage.nbytes() for storage in kept.values())
