"""Distributed checkpoints of model and optimizer in Megatron-Core's torch_dist format, readable at any layout.

torch.distributed.checkpoint writes them from the training process. Megatron-Core's own writer starts a manager process
and one process per file: that costs seconds per save, survives a killed run, and hangs where psutil is missing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

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
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from eaopd_megatron.distributed.collective_errors import (
    describe_error,
    find_os_error,
    first_error,
    run_on_all_or_raise,
    run_on_main_or_raise,
)
from eaopd_megatron.distributed.cpu_compat import cuda_as_cpu
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError, one_line
from eaopd_megatron.megatron.model import ModelChunks, wait_all_param_gathers
from eaopd_megatron.megatron.optimizer_state import load_optimizer_state, sharded_optimizer_state
from eaopd_megatron.utils.files import fsync_path

MODEL_PREFIX = "model."
"""Prefix of the model's tensor names in a checkpoint."""
_EXTRA_STATE_SUFFIX = "_extra_state"
"""Suffix of Transformer Engine's entries, which are not tensors of the model."""
_FORMAT = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)


def sharded_training_state(model: ModelChunks, optimizer: ChainedOptimizer | None = None) -> dict[str, Any]:
    """Return the sharded state dict of a model and its optimizer, for saving or for loading into; it copies nothing."""
    wait_all_param_gathers(model)
    chunks = {str(stage): gpt.sharded_state_dict(prefix=MODEL_PREFIX) for stage, gpt in enumerate(model.gpts)}
    state: dict[str, Any] = {"model": chunks}  # layer names inside a chunk are local, those in the checkpoint global
    if optimizer is not None:
        state["optimizer"] = sharded_optimizer_state(optimizer, state["model"])
    return state


def load_training_state(model: ModelChunks, optimizer: ChainedOptimizer | None, loaded: dict[str, Any]) -> None:
    """Copy the result of `load_sharded(sharded_training_state(...))` into the model and its optimizer."""
    wait_all_param_gathers(model)
    for stage, gpt in enumerate(model.gpts):
        _fill(gpt, {name.removeprefix(MODEL_PREFIX): value for name, value in loaded["model"][str(stage)].items()})
    if optimizer is not None:
        load_optimizer_state(optimizer, loaded["optimizer"])


def _fill(gpt: torch.nn.Module, values: dict[str, Any]) -> None:
    """Load one chunk's tensors. Transformer Engine's extra state may be missing or unexpected."""
    mismatched = [name for names in gpt.load_state_dict(values, strict=False) for name in names]
    tensors = [name for name in mismatched if not name.endswith(_EXTRA_STATE_SUFFIX)]
    if tensors:
        raise ValueError(f"the checkpoint's and the model's tensors differ: {', '.join(tensors[:3])}")


@dataclass(frozen=True)
class StagedState:
    """The data this rank is going to write."""

    shards: dict[str, Any]  # this rank's, as a state dict of torch.distributed.checkpoint
    common: dict[str, Any]  # everything that is not sharded; equal on all ranks


def save_sharded(folder: Path, state: dict[str, Any], parallel: ParallelState) -> None:
    """Write a Megatron sharded state dict into `folder`, an empty folder on a shared filesystem, and fsync every file.

    Collective. Sharded tensors and objects go to `__<rank>_0.distcp`, everything else (equal on all ranks) to
    `common.pt`. If a rank fails, all ranks raise the first failing rank's error: an OSError with its errno, or a
    RuntimeError.
    """
    write_staged(folder, stage_sharded(state, parallel), parallel)


def stage_sharded(
    state: dict[str, Any], parallel: ParallelState, stager: BlockingAsyncStager | None = None
) -> StagedState:
    """Run the part of `save_sharded` that uses the training's process groups. Collective.

    stager: copy the shards to its host buffers, so that training may change the weights before `write_staged` ends.
    The result is valid until the stager's next use. Without one the shards alias the training's tensors.
    """
    sharded, common = run_on_all_or_raise(parallel, lambda: save_preprocess(state))
    with cuda_as_cpu():
        return StagedState(_shards(sharded, stager), common)


def write_staged(
    folder: Path, staged: StagedState, parallel: ParallelState, group: dist.ProcessGroup | None = None
) -> None:
    """Run the second half of `save_sharded`: plan and write.

    group: a group of all ranks that no other thread uses; the default group if None.
    """
    run_on_main_or_raise(parallel, lambda: _write_common(folder, staged.common), group)
    try:
        with cuda_as_cpu():
            _write_shards(folder, staged.shards, group)
    except checkpoint.CheckpointException as errors:  # not an Exception; every rank gets the errors of all ranks
        raise first_error({rank: describe_error(error) for rank, (error, _) in errors.failures.items()}) from errors


def load_sharded(folder: Path, state: dict[str, Any], parallel: ParallelState) -> dict[str, Any]:
    """Read the shards that `state` (a sharded state dict built for loading) names. Collective.

    Returns `state` with tensors in place of the shards. Raises UserError if the folder is not a distributed checkpoint,
    or if it lacks a tensor or has it in another shape.
    """
    if not (folder / CONFIG_FNAME).is_file():
        raise UserError(f"{folder}: not a distributed checkpoint ({CONFIG_FNAME} is missing)")
    try:
        with cuda_as_cpu(), reading_untrusted(folder):
            return dist_checkpointing.load(_without_missing_extra_state(folder, state), str(folder))
    except checkpoint.CheckpointException as errors:
        error = errors.failures[min(errors.failures)][0]
        if isinstance(error, pickle.UnpicklingError):
            raise _pickle_error(folder, error) from None
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{folder}: {one_line(text, 300)}") from errors
    except CheckpointingException as error:
        raise UserError(f"{folder}: {one_line(error, 300)}") from error


_METADATA_CLASSES = {
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
            *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
}
"""All that the pickle `.metadata` of a distributed checkpoint names, beside torch's dtypes."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _load_metadata(file: Any, **options: Any) -> Any:
    """Stand in for `pickle.load` of `.metadata`. Raises UnpicklingError for other classes and paths elsewhere."""
    try:
        metadata = _MetadataUnpickler(file).load()
        paths = {str(info.relative_path) for info in (metadata.storage_data or {}).values()}
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # any type: a damaged pickle
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__})") from None
    if outside := sorted(path for path in paths if path != os.path.basename(path) or path in ("", ".", "..")):
        raise pickle.UnpicklingError(f"it places tensors in {outside[0]}, outside the folder")
    return metadata


@contextlib.contextmanager
def reading_untrusted(folder: Path) -> Iterator[None]:
    """Let torch and Megatron-Core read a checkpoint, of which they unpickle `.metadata`, common.pt and all objects,
    without running code that a stranger put there. Raises UserError in its place."""
    before = dict(os.environ)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # the planner asks for the opposite; both libraries' classes pass
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        with mock.patch("pickle.load", _load_metadata):
            yield
    except pickle.UnpicklingError as error:
        raise _pickle_error(folder, error) from None
    finally:
        for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _pickle_error(folder: Path, error: Exception) -> UserError:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch tells it in the middle of many lines
    why = f"it names {named[1]}, which no checkpoint needs" if named else one_line(error, 200)
    return UserError(f"{folder}: refused, because reading it could run foreign code or it is damaged: {why}")


def _without_missing_extra_state(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Drop Transformer Engine's extra state where the checkpoint has none because it was written without it."""
    stored = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata

    def is_loadable(value: Any) -> bool:
        extra = isinstance(value, ShardedObject) and value.key.endswith(_EXTRA_STATE_SUFFIX)
        return not extra or value.unique_key in stored

    return extract_matching_values(state, is_loadable)[0]


def _write_common(folder: Path, common: dict[str, Any]) -> None:
    with open(folder / COMMON_STATE_FNAME, "wb") as file:
        torch.save(common, file)
    (folder / CONFIG_FNAME).write_text(json.dumps(asdict(_FORMAT)))
    for name in (COMMON_STATE_FNAME, CONFIG_FNAME):
        fsync_path(folder / name)


class _ErrnoFileSystem(FileSystem):
    """Re-raise the OSError (with its errno) that torch's zip writer replaces by an error of its own."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except Exception as error:
            os_error = find_os_error(error)
            if os_error is None:
                raise
            raise OSError(os_error.errno, os_error.strerror, str(path)) from error


def _shards(sharded: dict[str, Any], stager: BlockingAsyncStager | None) -> dict[str, Any]:
    """Return the shards whose first replica is on this rank, in torch.distributed.checkpoint's form."""
    shards: dict[str, list[Any]] = defaultdict(list)
    tensors: list[Any] = []
    for shard in nested_values(sharded):
        if is_main_replica(shard.replica_id):
            is_object = isinstance(shard, ShardedObject)
            shards[shard.unique_key if is_object else shard.key].append(shard)
            if not is_object:
                tensors.append(shard)
    if stager is not None:
        staged = _copy_to_host(stager, {str(i): shard.data.detach() for i, shard in enumerate(tensors)})
        for i, shard in enumerate(tensors):
            shard.data = staged[str(i)]
    return mcore_to_pyt_state_dict(shards)


def _copy_to_host(stager: BlockingAsyncStager, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors into the stager's buffers. The first call allocates them, pinned for tensors on a GPU only: the
    stager would also pin those of a distributed optimizer's states, which are in host memory already."""
    if stager.state_dict_cache is None:
        stager.state_dict_cache = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for name, tensor in tensors.items()
        }
    return stager.stage(tensors)


def _write_shards(folder: Path, shards: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """Write shards with Megatron-Core's save planner and torch's file writer."""
    writer = checkpoint.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.fs = _ErrnoFileSystem()
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    checkpoint.save(shards, storage_writer=writer, planner=planner, process_group=group)
