"""Load Hugging Face tensors into the parameters of this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed.parallel_state import ParallelState, gather_objects
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.models.mapping import EMBEDDING, OUTPUT, MappedParam, PermutedRows, ShardSpec
from eaopd_megatron.models.shapes import padded_vocab_size


@dataclass(frozen=True)
class ShardPlacement:
    """Which ranks of a layout hold which parameters. sizes: the model's sizes, by the names in its family's rules."""

    layout: ParallelLayout
    sizes: Mapping[str, int]

    def stage(self, param: MappedParam) -> int:
        """Return the pipeline rank that holds a parameter (of a tied embedding: the first of its two)."""
        if param.layer is None:
            return 0 if param.megatron_name == EMBEDDING else self.layout.pipeline_parallel - 1
        chunks = self.layout.pipeline_parallel * self.layout.virtual_pipeline
        chunk = param.layer // (self.sizes["layers"] // chunks)
        return chunk % self.layout.pipeline_parallel

    def expert_rank(self, param: MappedParam) -> int | None:
        """Return the expert-parallel rank that holds an expert's parameter; None for other parameters."""
        if param.expert is None:
            return None
        return param.expert // (self.sizes["experts"] // self.layout.expert_parallel)

    def num_shards(self, param: MappedParam) -> int:
        """Return the number of ranks over which one copy of the parameter is sharded."""
        return self.layout.tensor_parallel if param.expert is None else self.layout.expert_tensor_parallel

    def shard_spec(self, param: MappedParam, number: int = 0) -> ShardSpec:
        """Return the spec of one shard of a parameter. number: rank in the (expert-)tensor-parallel group."""
        padded = padded_vocab_size(self.sizes["vocab"], self.layout.tensor_parallel)
        return ShardSpec(number, self.num_shards(param), self.sizes, padded)

    def holds(self, parallel: ParallelState, param: MappedParam) -> bool:
        """Return whether this rank has a shard of the parameter."""
        return self.stage(param) == parallel.pp_rank and self.expert_rank(param) in (None, parallel.ep_rank)


class RankMap:
    """Which global ranks hold the first copy of each shard. Constructing it is collective."""

    def __init__(self, parallel: ParallelState) -> None:
        replica = parallel.dp_rank * parallel.cp_size + parallel.cp_rank  # among the ranks with the same dense shards
        dense = parallel.pp_rank, parallel.tp_rank, replica
        experts = parallel.ep_rank, parallel.etp_rank, parallel.expert_dp_rank
        self._dense: dict[int, dict[int, int]] = {}
        self._experts: dict[tuple[int, int], dict[int, int]] = {}
        places = gather_objects((*dense, *experts), parallel.world_size)
        for rank, (stage, shard, replica, expert, expert_shard, expert_replica) in enumerate(places):
            if replica == 0:
                self._dense.setdefault(stage, {})[shard] = rank
            if expert_replica == 0:
                self._experts.setdefault((stage, expert), {})[expert_shard] = rank

    def holders(self, placement: ShardPlacement, param: MappedParam) -> Sequence[int]:
        """Return the global ranks that hold the first copy of a parameter, in shard order."""
        stage, expert = placement.stage(param), placement.expert_rank(param)
        ranks = self._dense[stage] if expert is None else self._experts[stage, expert]
        return [ranks[number] for number in range(placement.num_shards(param))]


def shard_placement(folder: HfFolder, layout: ParallelLayout) -> ShardPlacement:
    """Return where a layout puts the parameters of a folder's model."""
    return ShardPlacement(layout, folder.family.sizes(folder.config))


def shard_shape(param: MappedParam, placement: ShardPlacement) -> torch.Size:
    """Return the shape of one shard of a parameter."""
    tensors = [torch.empty(shape, device="meta") for _, shape in param.hf_tensors]
    return param.mapping.shard(tensors, placement.shard_spec(param)).shape


@torch.no_grad()
def load_hf(
    model: ModelChunks, folder: HfFolder, parallel: ParallelState, *, row_map: dict[int, int] | None = None
) -> None:
    """Fill this rank's parameters in place and in the model's dtype, reading one tensor's slice at a time.

    The tied embedding's copy on the last pipeline stage is filled from the embedding. An output layer with another
    vocabulary size (`build_model(..., output_vocab=...)`) gets the folder's rows as far as there are any, else zeros.
    row_map: token ids whose rows are swapped in the output layer only: row i becomes the folder's row `row_map[i]` (one
    direction of a swap is enough). With tied embeddings it needs `build_model(..., untie=True)`.
    Raises UserError if a tensor is missing, unknown or not of the shape that config.json implies, and ValueError if a
    parameter of the model has no tensor or a tensor no parameter.
    """
    if row_map and model.gpts[-1].share_embeddings_and_output_weights:
        raise ValueError("row_map needs an output layer beside the embedding: build_model(..., untie=True)")
    swaps = _permutation(row_map or {}, folder.vocab_size)
    folder.check_tensors()
    parameters = model.global_parameters()
    placement = shard_placement(folder, parallel.layout)
    for param in folder.family.params(folder.config, own_output=OUTPUT in parameters):
        if not placement.holds(parallel, param):
            continue
        parameter = parameters.pop(param.megatron_name, None)
        if parameter is None:
            raise ValueError(
                f"the mapping of {folder.family.architecture} has {param.megatron_name}, the model does not"
            )
        number = parallel.tp_rank if param.expert is None else parallel.etp_rank
        spec = placement.shard_spec(param, number)
        if param.megatron_name == OUTPUT:
            spec = replace(spec, padded_vocab_size=parameter.shape[0] * spec.tp_size)
        shard = param.mapping.shard(_sources(param, folder, swaps), spec)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{param.megatron_name}: the mapping gives {tuple(shard.shape)}, not {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
        del shard  # before the next one is read
    if parameters:
        raise ValueError(f"the mapping of {folder.family.architecture} leaves {', '.join(sorted(parameters))} unfilled")


@torch.no_grad()
def load_output_head(
    folder: HfFolder, *, tp_rank: int, tp_size: int, rows: int, vocab_size: int, row_map: dict[int, int] | None = None
) -> torch.Tensor:
    """Return the output layer (or the embedding tied to it), sharded and padded like that of another model.

    Shape [rows on this rank, hidden size], in the folder's dtype; only these rows are read. rows: the other model's
    vocabulary size, which sets padding and shard size. vocab_size: rows filled from the folder; the others are zero.
    row_map: as for `load_hf`. Raises UserError as `load_hf` does.
    """
    folder.check_tensors()
    param = next(e for e in folder.family.params(folder.config, own_output=True) if e.megatron_name == OUTPUT)
    spec = ShardSpec(tp_rank, tp_size, {"vocab": vocab_size}, padded_vocab_size(rows, tp_size))
    return param.mapping.shard(_sources(param, folder, _permutation(row_map or {}, vocab_size)), spec)


def _sources(param: MappedParam, folder: HfFolder, swaps: Mapping[int, int]) -> list[Any]:
    """Return the lazy tensors of a parameter, with swapped rows in the output layer."""
    sources: list[Any] = [folder.slice(name) for name, _ in param.hf_tensors]
    return [PermutedRows(source, swaps) for source in sources] if param.megatron_name == OUTPUT and swaps else sources


def _permutation(rows: Mapping[int, int], vocab_size: int) -> dict[int, int]:
    swaps = {origin: row for row, origin in rows.items()} | dict(rows)
    if set(swaps) != set(swaps.values()) or not all(0 <= row < vocab_size for row in swaps):
        raise ValueError(f"row_map {dict(rows)} is not a swap of ids below {vocab_size}")
    return {row: origin for row, origin in swaps.items() if row != origin}
