"""Set-up and tear-down of torch.distributed and of Megatron-Core's process groups."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch.distributed.rendezvous import rendezvous

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed import cpu_compat as cpu
from eaopd_megatron.utils.gpu_environment import local_device_index

T = TypeVar("T")


@dataclass(frozen=True)
class ParallelState:
    """This process's ranks, process groups and device."""

    layout: ParallelLayout
    rank: int
    world_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    dp_rank: int  # context-parallel ranks, which share their samples, have the same one
    dp_size: int
    dp_group: dist.ProcessGroup
    device: torch.device
    pp_rank: int = 0
    pp_group: dist.ProcessGroup | None = None
    cp_rank: int = 0
    cp_group: dist.ProcessGroup | None = None
    tp_cp_rank: int = 0  # among the ranks of one pipeline stage of one model replica
    tp_cp_group: dist.ProcessGroup | None = None
    ep_rank: int = 0
    ep_group: dist.ProcessGroup | None = None
    etp_rank: int = 0
    etp_group: dist.ProcessGroup | None = None
    expert_dp_rank: int = 0  # among the ranks that hold the same experts

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    @property
    def reports_metrics(self) -> bool:
        """Whether this rank's token statistics enter the metrics: last pipeline stage, TP rank 0."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def tp_size(self) -> int:
        return self.layout.tensor_parallel

    @property
    def pp_size(self) -> int:
        return self.layout.pipeline_parallel

    @property
    def cp_size(self) -> int:
        return self.layout.context_parallel

    @property
    def ep_size(self) -> int:
        return self.layout.expert_parallel

    @property
    def tp_cp_size(self) -> int:
        return self.tp_size * self.cp_size

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer and computes the objective."""
        return self.pp_rank == self.pp_size - 1

    def tp_src_rank(self) -> int:
        """Return the global rank of the tensor-parallel group's first member, which samples for the others."""
        return dist.get_global_rank(self.tp_group, 0)


def init_distributed(
    layout: ParallelLayout, *, seed: int = 0, timeout_minutes: float = 10.0
) -> tuple[ParallelState, dist.Store]:
    """Initialise torch.distributed from RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR/PORT, and Megatron-Core's groups.

    Returns the parallel state and the rendezvous store. Raises UserError if the layout does not divide the number of
    ranks. Call `shutdown_distributed` at the end.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    layout.check_world_size(world_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device_index())
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        backend, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=world_size, timeout=timeout
    )
    return initialize_model_parallel(layout, seed=seed, timeout_minutes=timeout_minutes), store


def initialize_model_parallel(layout: ParallelLayout, *, seed: int = 0, timeout_minutes: float = 10.0) -> ParallelState:
    """Create Megatron-Core's process groups over the initialised torch.distributed ranks, and seed its RNGs."""
    cpu.install_cpu_compat()
    layout.check_world_size(dist.get_world_size())
    interleaved = layout.virtual_pipeline > 1
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        distributed_timeout_minutes=max(1, int(timeout_minutes)),
    )
    with cpu.cuda_as_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    cuda = torch.cuda.is_available()
    return ParallelState(
        layout=layout,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=parallel_state.get_context_parallel_group(),
        tp_cp_rank=parallel_state.get_tensor_and_context_parallel_rank(),
        tp_cp_group=parallel_state.get_tensor_and_context_parallel_group(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
    )


def destroy_model_parallel() -> None:
    """Destroy Megatron-Core's process groups with their connections and threads (60 a rank on gloo)."""
    made = list(parallel_state._global_process_group_list or [])
    parallel_state.destroy_model_parallel()
    RotaryEmbedding.forward.cache_clear()  # its cache keeps models and their groups alive
    for group in made:
        if group is not None:  # None: the default group
            with contextlib.suppress(ValueError):  # Megatron-Core destroyed it already
                dist.destroy_process_group(group)


def shutdown_distributed() -> None:
    """Destroy Megatron-Core's groups and torch.distributed's."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def num_ranks_on_rank0_host(parallel: ParallelState) -> int:
    """Return the number of ranks on rank 0's host, including rank 0. Collective.

    Only torchrun sets LOCAL_WORLD_SIZE; srun and other launchers do not.
    """
    hosts = gather_objects(socket.gethostname(), parallel.world_size)
    return hosts.count(hosts[0])


def gather_objects(value: T, size: int, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return the picklable values of the group's `size` ranks, in their order. Collective. group None: all ranks."""
    gathered = [value] * size
    if size > 1:
        dist.all_gather_object(gathered, value, group)
    return gathered
