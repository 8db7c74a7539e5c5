"""Hugging Face tensors → the parameters of this rank's shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.mapping import OUTPUT, Place, SwappedRows
from eaopd_megatron.megatron.architecture import padded_vocab_size
from eaopd_megatron.megatron.groups import Parallel
from eaopd_megatron.megatron.model import ModelChunks


def place_of(folder: HfFolder, tp_rank: int, tp_size: int) -> Place:
    """The place of one tensor-parallel rank in a folder's model."""
    return Place(tp_rank, tp_size, folder.family.sizes(folder.config), padded_vocab_size(folder.vocab_size, tp_size))


@torch.no_grad()
def load_hf(model: ModelChunks, folder: HfFolder, parallel: Parallel, *, row_map: dict[int, int] | None = None) -> None:
    """Fill this rank's shard in place, in the model's dtype; a rank reads only its part of each tensor.

    row_map: token ids whose rows are exchanged in the output layer, and in it alone: row i becomes the folder's row
    `row_map[i]` (one direction of an exchange is enough). Tied embeddings need a `build_model(…, untie=True)` for it.
    Raises UserError where a tensor is missing, unknown or of another shape than config.json says; ValueError where a
    parameter of the model is left without a tensor.
    """
    parameters = model.global_parameters()
    if row_map and OUTPUT not in parameters:
        raise ValueError("row_map needs an output layer beside the embedding: build_model(..., untie=True)")
    swaps = _permutation(row_map or {}, folder.vocab_size)
    folder.check_tensors()
    place = place_of(folder, parallel.tp_rank, parallel.tp_size)
    for entry in folder.family.entries(folder.config, own_output=OUTPUT in parameters):
        sources: list[Any] = [folder.slice(name) for name, _ in entry.sources]
        if entry.megatron == OUTPUT and swaps:
            sources = [SwappedRows(source, swaps) for source in sources]
        parameter = parameters.pop(entry.megatron)
        shard = entry.cut.shard(sources, place)
        if shard.shape != parameter.shape:
            raise ValueError(f"{entry.megatron}: the mapping gives {tuple(shard.shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(shard)
    if parameters:
        raise ValueError(f"the mapping of {folder.family.architecture} leaves {', '.join(sorted(parameters))} unfilled")


def _permutation(rows: Mapping[int, int], vocab_size: int) -> dict[int, int]:
    whole = {origin: row for row, origin in rows.items()} | dict(rows)
    if set(whole) != set(whole.values()) or not all(0 <= row < vocab_size for row in whole):
        raise ValueError(f"row_map {dict(rows)} is no exchange of ids below {vocab_size}")
    return {row: origin for row, origin in whole.items() if row != origin}
