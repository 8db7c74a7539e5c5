"""Run micro-batches through a model at any layout, by Megatron-Core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.data.packing import Packing, collate, group_by_teacher, split_into_micro_batches
from eaopd_megatron.data.types import MicroBatch, Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import gather_context_parallel, output_weight, response_hidden_states, stage_output
from eaopd_megatron.megatron.model import ModelChunks, unwrap_gpt

LastStageFn = Callable[[int, torch.Tensor], torch.Tensor | None]
"""(micro-batch index, its `response_hidden_states` [n, h]) -> its summed loss; forward only: None."""


def packing_for(layout: ParallelLayout, context_rank: int = 0) -> Packing:
    """Return what packing needs of a layout: the multiples that sequences are padded to, and the CP shard."""
    tensor = layout.tensor_parallel if layout.sequence_parallel else 1
    return Packing(tensor, layout.context_parallel, context_rank)


def micro_batches_by_teacher(
    samples: Sequence[Sample], budget: int, parallel: ParallelState, teachers: Sequence[str]
) -> list[MicroBatch]:
    """Return the `micro_batches` of each teacher's samples, in the order of `teachers`."""
    return [
        batch
        for name, group in group_by_teacher(samples, teachers)
        for batch in micro_batches(group, budget, parallel, name)
    ]


def micro_batches(
    samples: Sequence[Sample], budget: int, parallel: ParallelState, teacher: str = ""
) -> list[MicroBatch]:
    """Pack a data-parallel rank's samples into micro-batches of at most `budget` tokens, but at least one sample.

    Every data-parallel rank gets the same number (they share experts), at least one, padded with empty micro-batches;
    an interleaved schedule gets a multiple of its pipeline stages. Collective over the data-parallel group.
    """
    packing = packing_for(parallel.layout, parallel.cp_rank)
    parts: list[list[Sample]] = list(split_into_micro_batches(samples, budget, packing))
    count = torch.tensor(max(1, len(parts)), device=parallel.device)
    if parallel.dp_size > 1:
        dist.all_reduce(count, op=dist.ReduceOp.MAX, group=parallel.dp_group)
    multiple = parallel.pp_size if parallel.layout.virtual_pipeline > 1 else 1
    missing = -(-int(count) // multiple) * multiple - len(parts)
    parts += [[] for _ in range(missing)]
    return [collate(part, parallel.device, packing, teacher) for part in parts]


def run_forward(model: ModelChunks, batches: Sequence[MicroBatch], on_last_stage: LastStageFn) -> None:
    """Run the micro-batches without gradients; `on_last_stage` is called on the last pipeline stage. Collective."""
    with torch.no_grad():
        _run(model, batches, on_last_stage, forward_only=True)


def run_forward_backward(model: ModelChunks, batches: Sequence[MicroBatch], on_last_stage: LastStageFn) -> None:
    """Run the micro-batches and accumulate the gradients of their summed losses in the model's buffers, undivided.

    `on_last_stage` runs on the last pipeline stage, also for an empty micro-batch, whose loss must depend on its rows:
    no collective of the backward pass depends on data. Call `optimizer.finalize_gradients` next. Collective.
    """
    model.config.no_sync_func = _no_sync(model)
    _run(model, batches, on_last_stage, forward_only=False)


def gather_logits(model: ModelChunks, token_ids: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    """Return the logits [b, s, padded vocab] of token_ids [b, s], equal on every rank, without gradient. Collective."""
    b, s = token_ids.shape
    batch = single_batch(token_ids, parallel)
    batches = [batch] * (parallel.pp_size if parallel.layout.virtual_pipeline > 1 else 1)
    gathered: list[torch.Tensor] = []

    def on_last_stage(index: int, hidden: torch.Tensor) -> None:
        shard = hidden @ output_weight(model).T
        parts = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
        dist.all_gather(parts, shard.contiguous(), group=parallel.tp_group)
        gathered[:] = [gather_context_parallel(batch, torch.cat(parts, -1), parallel)]

    run_forward(model, batches, on_last_stage)
    width = unwrap_gpt(model).vocab_size
    logits = gathered[0] if gathered else torch.empty(b * s, width, dtype=model.dtype, device=parallel.device)
    return broadcast_from_last_stage(logits, parallel).view(b, s, width)


def single_batch(token_ids: torch.Tensor, parallel: ParallelState) -> MicroBatch:
    """Return one micro-batch of token_ids [b, s] with the logits of all b * s positions."""
    # one response token too many: it is not an input, and its logits are those of the last position
    samples = [Sample(Prompt("", (row[0],), {}), [*row[1:], 0], "length", [], 0) for row in token_ids.tolist()]
    return collate(samples, parallel.device, packing_for(parallel.layout, parallel.cp_rank))


def broadcast_from_last_stage(values: torch.Tensor, parallel: ParallelState) -> torch.Tensor:
    """Return the last pipeline stage's tensor on every stage; the others pass a buffer of its shape and dtype."""
    if parallel.pp_size > 1 and values.numel():
        assert parallel.pp_group is not None
        source = dist.get_global_rank(parallel.pp_group, parallel.pp_size - 1)
        dist.broadcast(values, source, group=parallel.pp_group)
    return values


def _run(model: ModelChunks, batches: Sequence[MicroBatch], on_last_stage: LastStageFn, *, forward_only: bool) -> None:
    chunks = list(model)

    def forward_step(numbers: Iterator[int], chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        index = next(numbers)
        batch = batches[index]

        def finish(hidden: torch.Tensor, non_loss_data: bool = False) -> tuple[torch.Tensor | None, Any, None] | None:
            loss = on_last_stage(index, response_hidden_states(model, hidden, batch))
            # with three values Megatron-Core leaves the loss undivided, since the configuration sums per token
            return None if non_loss_data else (loss, torch.zeros((), dtype=torch.int), None)

        return stage_output(chunk, batch), finish

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(len(batches))) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=1,  # shapes travel with the tensors: variable_seq_lengths
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _no_sync(model: ModelChunks) -> Any:
    """Return the contexts that defer an overlapped gradient reduction to the last micro-batch; None without overlap."""
    overlapped = [
        chunk.no_sync
        for chunk in model
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_grad_reduce
    ]
    if not overlapped:
        return None
    return overlapped if len(overlapped) > 1 else overlapped[0]
