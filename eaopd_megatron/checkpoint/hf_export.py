"""Gather the parameters of all ranks and write them as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import RankMap, shard_placement, shard_shape
from eaopd_megatron.checkpoint.safetensors_io import PlannedTensor, TensorWriter
from eaopd_megatron.distributed.collective_errors import raise_on_all
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.models.mapping import MappedParam
from eaopd_megatron.utils.files import atomic_directory, read_json

T = TypeVar("T")
NamedTensors = Iterator[tuple[str, torch.Tensor]]
"""Hugging Face tensors of a model, one at a time, as (name, tensor)."""

HF_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MAX_SHARD_BYTES = 5 * 10**9
"""Maximum size of a safetensors file."""


def gather_hf_tensors(
    shards: Mapping[str, torch.Tensor], folder: HfFolder, parallel: ParallelState, *, on_device: bool = False
) -> NamedTensors:
    """Yield a model's Hugging Face tensors one at a time on the main rank, gathered from all ranks' shards.

    shards maps Megatron names to this rank's part of a parameter (or of its gradient), all of one dtype. Collective
    over all ranks: each rank must exhaust the iterator (`run_on_main` does so); on ranks other than the main one it
    yields nothing. The last pipeline stage's copy of a tied embedding is skipped.
    on_device: keep the tensors on the shards' device (GPU) and send them from there; otherwise they go to host memory.
    A tensor that no layout shards may be the parameter itself.
    """
    rank_map = RankMap(parallel)
    placement = shard_placement(folder, parallel.layout)
    dtype = next(iter(shards.values())).dtype
    device = parallel.device if on_device else torch.device("cpu")
    for param in _entries(folder):
        holders = rank_map.holders(placement, param)
        if not parallel.is_main:
            if parallel.rank in holders:
                _send(shards[param.megatron_name], device)
            continue
        shape = shard_shape(param, placement)
        parts = [
            shards[param.megatron_name].detach().to(device)
            if rank == parallel.rank
            else _receive(torch.empty(shape, dtype=dtype, device=device), rank)
            for rank in holders
        ]
        merged = param.mapping.merge(parts, placement.shard_spec(param))
        del parts  # the consumer may copy the tensors once more
        yield from zip((name for name, _ in param.hf_tensors), merged, strict=True)


def run_on_main(tensors: NamedTensors, parallel: ParallelState, work: Callable[[NamedTensors], T]) -> T | None:
    """Return `work(tensors)` on the main rank and None elsewhere. tensors: from `gather_hf_tensors`. Collective.

    An error in `work` is raised on all ranks, after all of them have exhausted the tensors.
    """
    result: T | None = None
    error: Exception | None = None
    if parallel.is_main:
        try:
            result = work(tensors)
        except Exception as raised:  # raised below: the other ranks still have to send
            error = raised
    for _ in tensors:
        pass
    raise_on_all(parallel, error)
    return result


def export_hf(
    model: ModelChunks,
    parallel: ParallelState,
    hf_source: HfFolder,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model as the Hugging Face folder `out`: safetensors, configuration, tokenizer.

    Collective; global rank 0 writes. hf_source provides configuration and tokenizer. dtype None means the model's own.
    Tensors are gathered and written one at a time. `out` appears, or is replaced, when it is complete; on a full disk
    all ranks raise UserError and `out` stays as it was.
    """
    parameters: dict[str, torch.Tensor] = dict(model.global_parameters())
    if not model.gpts[-1].share_embeddings_and_output_weights and hf_source.config.tie_word_embeddings:
        raise ValueError("a model with an output layer of its own cannot be exported under tied embeddings")
    written = dtype or next(iter(parameters.values())).dtype
    tensors = gather_hf_tensors(parameters, hf_source, parallel)
    run_on_main(tensors, parallel, lambda found: write_hf(found, hf_source, out, written, max_shard_bytes))


def _entries(folder: HfFolder) -> list[MappedParam]:
    return folder.family.params(folder.config, own_output=not folder.config.tie_word_embeddings)


def write_hf(
    tensors: NamedTensors, source: HfFolder, out: Path, dtype: torch.dtype, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write gathered tensors, with `source`'s configuration and tokenizer, as the folder `out` (see `export_hf`)."""
    plan = [PlannedTensor(name, shape, dtype) for param in _entries(source) for name, shape in param.hf_tensors]
    with atomic_directory(out) as folder:
        needed, free = sum(tensor.nbytes for tensor in plan), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{out}: the weights need {needed} bytes, the disk has {free} left; nothing was written there"
            )
        with TensorWriter(folder, plan, max_shard_bytes) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        source.copy_config_and_tokenizer(folder)
        _write_config(source, folder, dtype)


def _write_config(source: HfFolder, folder: Path, dtype: torch.dtype) -> None:
    """Write the source's config.json with the written dtype under the key that the source uses."""
    config = read_json(source.path / "config.json", source.label)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = HF_DTYPE_NAMES[dtype]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _send(shard: torch.Tensor, device: torch.device) -> None:
    """Send a shard to the main rank as bytes, so that the backend need not support its dtype."""
    dist.send(shard.detach().to(device).contiguous().reshape(-1).view(torch.uint8), dst=0)


def _receive(into: torch.Tensor, rank: int) -> torch.Tensor:
    dist.recv(into.reshape(-1).view(torch.uint8), src=rank)
    return into
