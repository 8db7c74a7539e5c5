"""Model and optimiser in Megatron-Core's torch_dist format: each rank writes its shard, any layout reads them.

Written by torch.distributed.checkpoint from this very process. Megatron-Core's own writer starts a manager process and
one more a file: that costs seconds a save, outlives a killed run, and waits for ever where psutil is missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.optimizer import ChainedOptimizer
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import FileSystem

from eaopd_megatron.distributed.collective_errors import describe_error, find_os_error, first_error, run_on_all_or_raise
from eaopd_megatron.distributed.cpu_compat import cuda_as_cpu
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.model import ModelChunks, wait_all_param_gathers
from eaopd_megatron.megatron.optimizer_state import load_optimizer_state, sharded_optimizer_state

MODEL_PREFIX = "model."
"""What the names of a model's tensors start with in a checkpoint."""
_EXTRA_STATE_SUFFIX = "_extra_state"
"""What the names of Transformer Engine's state end with that is no tensor of the model."""
_FORMAT = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)


def sharded_training_state(
    model: ModelChunks, optimizer: ChainedOptimizer | None = None, *, loading: bool = False
) -> dict[str, Any]:
    """The sharded state dict of a model and its optimiser, to be saved or (loading) to be filled. Collective."""
    wait_all_param_gathers(model)
    chunks = {str(stage): gpt.sharded_state_dict(prefix=MODEL_PREFIX) for stage, gpt in enumerate(model.gpts)}
    state: dict[str, Any] = {"model": chunks}  # a chunk's own names are local; the checkpoint's are global
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer_state(optimizer, state["model"], loading=loading)
    return state


def load_training_state(model: ModelChunks, optimizer: ChainedOptimizer | None, loaded: dict[str, Any]) -> None:
    """Put what `load_sharded` returned for `training_state(..., loading=True)` into the model and its optimiser."""
    wait_all_param_gathers(model)
    for stage, gpt in enumerate(model.gpts):
        _fill(gpt, {name.removeprefix(MODEL_PREFIX): value for name, value in loaded["model"][str(stage)].items()})
    if optimizer is not None:
        load_optimizer_state(optimizer, loaded["optimizer"])


def _fill(gpt: torch.nn.Module, values: dict[str, Any]) -> None:
    """Load a chunk's tensors. Transformer Engine's extra state may be missing, or be more than the chunk takes."""
    odd = [name for names in gpt.load_state_dict(values, strict=False) for name in names]
    wrong = [name for name in odd if not name.endswith(_EXTRA_STATE_SUFFIX)]
    if wrong:
        raise ValueError(f"the checkpoint's and the model's tensors differ: {', '.join(wrong[:3])}")


@dataclass(frozen=True)
class StagedState:
    """What this rank will write: its shards, and (equal on all ranks) the rest."""

    shards: dict[str, Any]  # in the form of torch.distributed.checkpoint
    common: dict[str, Any]


def save_sharded(folder: Path, state: dict[str, Any], parallel: ParallelState) -> None:
    """Write a Megatron sharded state dict into `folder`, an empty folder that all ranks see; every file is synced.

    Collective. Sharded tensors and objects go to `__<rank>_0.distcp`, the rest (equal on all ranks) to `common.pt`.
    When a rank fails, all ranks raise the first rank's error: an OSError with its errno, else a RuntimeError.
    """
    write_staged(folder, stage_sharded(state, parallel), parallel)


def stage_sharded(state: dict[str, Any], parallel: ParallelState, *, copy: bool = False) -> StagedState:
    """The first half of `save_sharded`: all that needs the training's process groups.

    copy: the shards are copied to host memory, so that training may go on. Where they come from CUDA it is pinned; that
    has not been run.
    """
    sharded, common = run_on_all_or_raise(parallel, lambda: save_preprocess(state))
    with cuda_as_cpu():
        return StagedState(_shards(sharded, copy), common)


def write_staged(
    folder: Path, prepared: StagedState, parallel: ParallelState, group: dist.ProcessGroup | None = None
) -> None:
    """The second half: planning and writing, over a group of all ranks; a thread gives one of its own."""
    run_on_all_or_raise(parallel, lambda: _write_common(folder, prepared.common) if parallel.is_main else None, group)
    try:
        with cuda_as_cpu():
            _write_shards(folder, prepared.shards, group)
    except checkpoint.CheckpointException as errors:  # no subclass of Exception; each rank gets the errors of all
        raise first_error({rank: describe_error(error) for rank, (error, _) in errors.failures.items()}) from errors


def load_sharded(folder: Path, state: dict[str, Any], parallel: ParallelState) -> dict[str, Any]:
    """Read what `state` (a sharded state dict built for loading) asks for; returns tensors in the place of its shards.

    Collective. Raises UserError where the folder is no such checkpoint, or lacks a tensor or its shape.
    """
    if not (folder / CONFIG_FNAME).is_file():
        raise UserError(f"{folder}: not a distributed checkpoint ({CONFIG_FNAME} is missing)")
    try:
        with cuda_as_cpu():
            return dist_checkpointing.load(_without_absent_extras(folder, state), str(folder))
    except checkpoint.CheckpointException as errors:
        error = errors.failures[min(errors.failures)][0]
        raise UserError(f"{folder}: {_one_line(error)}") from errors
    except CheckpointingException as error:
        raise UserError(f"{folder}: {_one_line(error)}") from error


def _without_absent_extras(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state without Transformer Engine's extras that the checkpoint does not have: it was made without Engine."""
    stored = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata

    def asked(value: Any) -> bool:
        extra = isinstance(value, ShardedObject) and value.key.endswith(_EXTRA_STATE_SUFFIX)
        return not extra or value.unique_key in stored

    return extract_matching_values(state, asked)[0]


def _write_common(folder: Path, common: dict[str, Any]) -> None:
    with open(folder / COMMON_STATE_FNAME, "wb") as file:
        torch.save(common, file)
        file.flush()
        os.fsync(file.fileno())
    with open(folder / CONFIG_FNAME, "w") as text:
        json.dump(asdict(_FORMAT), text)
        text.flush()
        os.fsync(text.fileno())


class _Files(FileSystem):
    """torch's zip writer answers a failed write with an error of its own: give the system's back, with its errno."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except Exception as error:
            found = find_os_error(error)
            if found is None:
                raise
            raise OSError(found.errno, found.strerror, str(path)) from error


def _shards(sharded: dict[str, Any], copy: bool) -> dict[str, Any]:
    """The shards that this rank writes, those of which it is the first holder."""
    shards: dict[str, list[Any]] = defaultdict(list)
    for shard in nested_values(sharded):
        if is_main_replica(shard.replica_id):
            is_object = isinstance(shard, ShardedObject)
            shards[shard.unique_key if is_object else shard.key].append(shard)
            if copy and not is_object:
                shard.data = _on_host(shard.data)
    if copy and torch.cuda.is_available():
        torch.cuda.synchronize()
    return mcore_to_pyt_state_dict(shards)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return host.copy_(tensor.detach(), non_blocking=True)


def _write_shards(folder: Path, shards: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """The one place that joins Megatron-Core's planner with torch's writer."""
    writer = checkpoint.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.fs = _Files()
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    checkpoint.save(shards, storage_writer=writer, planner=planner, process_group=group)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
