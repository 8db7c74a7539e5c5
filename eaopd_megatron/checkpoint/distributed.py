"""Model and optimiser in Megatron-Core's torch_dist format: each rank writes its shard, any layout reads them.

Written by torch.distributed.checkpoint from this very process. Megatron-Core's own writer starts a manager process and one
more process a file: that costs seconds a save, outlives a killed run, and waits for ever where psutil is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed import checkpoint
from torch.distributed.checkpoint.filesystem import FileSystem

from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.cpu import cuda_literals
from eaopd_megatron.megatron.groups import Parallel

FORMAT = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)
T = TypeVar("T")


def save_sharded(folder: Path, state: dict[str, Any], parallel: Parallel) -> None:
    """Write a Megatron sharded state dict into `folder`, an empty folder that all ranks see; every file is synced.

    Collective. ShardedTensors and ShardedObjects go to `__<rank>_0.distcp`, the rest (equal on all ranks) to `common.pt`.
    When a rank fails, all ranks raise the first rank's error: an OSError with its errno, else a RuntimeError.
    """
    sharded, common = agree(parallel, lambda: save_preprocess(state))
    agree(parallel, lambda: _write_common(folder, common) if parallel.is_main else None)
    failure = None
    try:
        with cuda_literals():
            _write_shards(folder, sharded)
    except checkpoint.CheckpointException as error:  # no subclass of Exception; every rank gets the errors of all
        failure = error
    if failure is not None:
        rank, (error, _) = min(failure.failures.items(), key=lambda item: item[0])
        raise _rebuild(rank, _describe(error)) from failure


def load_sharded(folder: Path, state: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """Read what `state` (a sharded state dict built for loading) asks for; returns it with tensors in the place of shards.

    Collective. Raises UserError where the folder is no such checkpoint, or lacks a tensor or its shape.
    """
    if not (folder / CONFIG_FNAME).is_file():
        raise UserError(f"{folder}: not a distributed checkpoint ({CONFIG_FNAME} is missing)")
    try:
        with cuda_literals():
            return dist_checkpointing.load(state, str(folder))
    except checkpoint.CheckpointException as error:
        cause = min(error.failures.items(), key=lambda item: item[0])[1][0]
        raise UserError(f"{folder}: {_one_line(cause)}") from error
    except CheckpointingException as error:
        raise UserError(f"{folder}: {_one_line(error)}") from error


def agree(parallel: Parallel, work: Callable[[], T]) -> T:
    """Do this rank's own work and wait for the others' (a barrier). When a rank fails, all ranks raise the first's error.

    The error arrives as UserError or OSError where it was one, otherwise as RuntimeError.
    """
    cause: Exception | None = None
    try:
        result = work()
    except Exception as error:
        cause = error
    errors: list[tuple[str, int, str] | None] = [_describe(cause) if cause else None]
    if parallel.world_size > 1:
        mine, errors = errors[0], [None] * parallel.world_size
        dist.all_gather_object(errors, mine)
    for rank, described in enumerate(errors):
        if described is not None:
            raise _rebuild(rank, described) from cause
    return result


def _write_common(folder: Path, common: dict[str, Any]) -> None:
    with open(folder / COMMON_STATE_FNAME, "wb") as file:
        torch.save(common, file)
        file.flush()
        os.fsync(file.fileno())
    with open(folder / CONFIG_FNAME, "w") as text:
        json.dump(asdict(FORMAT), text)
        text.flush()
        os.fsync(text.fileno())


class _Files(FileSystem):
    """torch's zip writer answers a failed write with an error of its own, which loses the system's: give that one back."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[Any]]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except Exception as error:
            found = _system_error(error)
            raise OSError(found.errno, found.strerror, str(path)) if found else error from error


def _write_shards(folder: Path, sharded: dict[str, Any]) -> None:
    """The one place that joins Megatron-Core's planner with torch's writer."""
    shards: dict[str, list[Any]] = defaultdict(list)
    for shard in nested_values(sharded):
        if is_main_replica(shard.replica_id):
            shards[shard.unique_key if isinstance(shard, ShardedObject) else shard.key].append(shard)
    writer = checkpoint.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.fs = _Files()
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    checkpoint.save(mcore_to_pyt_state_dict(shards), storage_writer=writer, planner=planner)


def _system_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _describe(error: BaseException) -> tuple[str, int, str]:
    """(kind, errno, text): what of an error can be sent to other ranks."""
    system = _system_error(error)
    if isinstance(error, UserError):
        return "user", 0, str(error)
    if system is not None and system.errno is not None:
        where = f": {system.filename}" if system.filename else ""
        return "system", system.errno, f"{system.strerror}{where}"
    return "other", 0, f"{type(error).__name__}: {error}"


def _rebuild(rank: int, described: tuple[str, int, str]) -> Exception:
    kind, number, text = described
    if kind == "user":
        return UserError(text)
    return OSError(number, text) if kind == "system" else RuntimeError(f"rank {rank}: {text}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
