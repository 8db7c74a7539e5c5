"""Hugging Face tensors → the parameters of this rank's shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.distributed.parallel_state import ParallelLayout, ParallelState
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.models.mapping import EMBEDDING, OUTPUT, MappedParam, PermutedRows, ShardSpec
from eaopd_megatron.models.shapes import padded_vocab_size


@dataclass(frozen=True)
class ShardPlacement:
    """A model's parameters over the ranks of a layout.

    sizes: the model's, by the names that its family's rules use.
    """

    layout: ParallelLayout
    sizes: Mapping[str, int]

    def stage(self, entry: MappedParam) -> int:
        """The pipeline rank that holds a parameter; a tied embedding's copy is the last one's."""
        if entry.layer is None:
            return 0 if entry.megatron_name == EMBEDDING else self.layout.pipeline_parallel - 1
        chunks = self.layout.pipeline_parallel * self.layout.virtual_pipeline
        chunk = entry.layer // (self.sizes["layers"] // chunks)
        return chunk % self.layout.pipeline_parallel

    def expert_rank(self, entry: MappedParam) -> int | None:
        """The expert-parallel rank that holds an expert's parameter; None for the parameters that all of them hold."""
        if entry.expert is None:
            return None
        return entry.expert // (self.sizes["experts"] // self.layout.expert_parallel)

    def shards(self, entry: MappedParam) -> int:
        """How many ranks share one copy of the parameter."""
        return self.layout.tensor_parallel if entry.expert is None else self.layout.expert_tensor_parallel

    def shard(self, entry: MappedParam, number: int = 0) -> ShardSpec:
        """The place of one of the ranks that share the parameter."""
        padded = padded_vocab_size(self.sizes["vocab"], self.layout.tensor_parallel)
        return ShardSpec(number, self.shards(entry), self.sizes, padded)

    def holds(self, parallel: ParallelState, entry: MappedParam) -> bool:
        """Whether this rank has a shard of the parameter."""
        return self.stage(entry) == parallel.pp_rank and self.expert_rank(entry) in (None, parallel.ep_rank)


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's numbers in the groups that decide what it holds. copy: 0 on the first of the ranks with the same."""

    pp_rank: int
    tp_rank: int
    replica: int
    ep_rank: int
    etp_rank: int
    expert_replica: int


class RankMap:
    """The seats of all ranks. Making it is collective over all ranks."""

    def __init__(self, parallel: ParallelState) -> None:
        mine = RankCoordinates(
            pp_rank=parallel.pp_rank,
            tp_rank=parallel.tp_rank,
            replica=parallel.dp_rank * parallel.cp_size + parallel.cp_rank,
            ep_rank=parallel.ep_rank,
            etp_rank=parallel.etp_rank,
            expert_replica=parallel.expert_dp_rank,
        )
        seats: list[RankCoordinates | None] = [mine]
        if parallel.world_size > 1:
            seats = [None] * parallel.world_size
            dist.all_gather_object(seats, mine)
        self._dense: dict[int, dict[int, int]] = {}
        self._experts: dict[tuple[int, int], dict[int, int]] = {}
        for rank, seat in enumerate(seats):
            assert seat is not None
            if seat.replica == 0:
                self._dense.setdefault(seat.pp_rank, {})[seat.tp_rank] = rank
            if seat.expert_replica == 0:
                self._experts.setdefault((seat.pp_rank, seat.ep_rank), {})[seat.etp_rank] = rank

    def holders(self, placement: ShardPlacement, entry: MappedParam) -> Sequence[int]:
        """Global ranks of one copy of a parameter, in the order of its shards."""
        stage, expert = placement.stage(entry), placement.expert_rank(entry)
        ranks = self._dense[stage] if expert is None else self._experts[stage, expert]
        return [ranks[number] for number in range(placement.shards(entry))]


def shard_placement(folder: HfFolder, layout: ParallelLayout) -> ShardPlacement:
    """Where a layout puts the parameters of a folder's model."""
    return ShardPlacement(layout, folder.family.sizes(folder.config))


def shard_shape(entry: MappedParam, placement: ShardPlacement) -> torch.Size:
    """The shape of a parameter on one of the ranks that share it."""
    tensors = [torch.empty(shape, device="meta") for _, shape in entry.hf_tensors]
    return entry.mapping.shard(tensors, placement.shard(entry)).shape


@torch.no_grad()
def load_hf(
    model: ModelChunks, folder: HfFolder, parallel: ParallelState, *, row_map: dict[int, int] | None = None
) -> None:
    """Fill what this rank holds in place, in the model's dtype, one tensor's part after another.

    A tied embedding's copy on the last pipeline stage is filled from the embedding. An output layer of another
    vocabulary's size (`build_model(…, output_vocab=…)`) gets the folder's rows as far as it has them, and zeros.
    row_map: token ids whose rows are exchanged in the output layer, and in it alone: row i becomes the folder's row
    `row_map[i]` (one direction of an exchange is enough). Tied embeddings need a `build_model(…, untie=True)` for it.
    Raises UserError where a tensor is missing, unknown or of another shape than config.json says; ValueError where a
    parameter of the model is left without a tensor, or a tensor without a parameter.
    """
    if row_map and model.gpts[-1].share_embeddings_and_output_weights:
        raise ValueError("row_map needs an output layer beside the embedding: build_model(..., untie=True)")
    swaps = _permutation(row_map or {}, folder.vocab_size)
    folder.check_tensors()
    parameters = model.global_parameters()
    placement = shard_placement(folder, parallel.layout)
    for entry in folder.family.params(folder.config, own_output=OUTPUT in parameters):
        if not placement.holds(parallel, entry):
            continue
        parameter = parameters.pop(entry.megatron_name, None)
        if parameter is None:
            raise ValueError(
                f"the mapping of {folder.family.architecture} has {entry.megatron_name}, the model has not"
            )
        number = parallel.tp_rank if entry.expert is None else parallel.etp_rank
        place = placement.shard(entry, number)
        if entry.megatron_name == OUTPUT:
            place = replace(place, padded_vocab_size=parameter.shape[0] * place.tp_size)
        shard = entry.mapping.shard(_sources(entry, folder, swaps), place)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"{entry.megatron_name}: the mapping gives {tuple(shard.shape)}, not {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
        del shard  # before the next one is read
    if parameters:
        raise ValueError(f"the mapping of {folder.family.architecture} leaves {', '.join(sorted(parameters))} unfilled")


@torch.no_grad()
def load_output_head(
    folder: HfFolder, *, tp_rank: int, tp_size: int, rows: int, vocab_size: int, row_map: dict[int, int] | None = None
) -> torch.Tensor:
    """A model's output layer alone, or the embedding that it is tied to, cut and padded as another model's is:
    [rows of a rank, hidden size], in the dtype of the folder.

    rows: vocabulary of the other model, whose padding and share of a rank it has. vocab_size: of both, the first rows
    that are filled; those beyond are zero. row_map: as for `load_hf`. Nothing but these rows is read. Raises UserError
    as `load_hf` does.
    """
    folder.check_tensors()
    entry = next(e for e in folder.family.params(folder.config, own_output=True) if e.megatron_name == OUTPUT)
    place = ShardSpec(tp_rank, tp_size, {"vocab": vocab_size}, padded_vocab_size(rows, tp_size))
    return entry.mapping.shard(_sources(entry, folder, _permutation(row_map or {}, vocab_size)), place)


def _sources(entry: MappedParam, folder: HfFolder, swaps: Mapping[int, int]) -> list[Any]:
    """What the parameter is cut from, the output layer's rows exchanged."""
    sources: list[Any] = [folder.slice(name) for name, _ in entry.hf_tensors]
    return [PermutedRows(source, swaps) for source in sources] if entry.megatron_name == OUTPUT and swaps else sources


def _permutation(rows: Mapping[int, int], vocab_size: int) -> dict[int, int]:
    whole = {origin: row for row, origin in rows.items()} | dict(rows)
    if set(whole) != set(whole.values()) or not all(0 <= row < vocab_size for row in whole):
        raise ValueError(f"row_map {dict(rows)} is no exchange of ids below {vocab_size}")
    return {row: origin for row, origin in whole.items() if row != origin}
