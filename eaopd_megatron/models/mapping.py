"""How Megatron-Core's parameters are cut from Hugging Face tensors, and put together again.

A family of models is a table of rules (`families/`): a Megatron name, the kind of cut, the Hugging Face tensors and
their shapes. Import and export walk the same table.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class ShardSpec:
    """Which shard: its number among the ranks that share the parameter, and the model's sizes by name.

    Those ranks are the tensor-parallel ones, for an expert's matrices the expert-tensor-parallel ones.
    """

    tp_rank: int
    tp_size: int
    sizes: Mapping[str, int]
    padded_vocab_size: int


class ParamMapping(ABC):
    """One kind of cut. Sources are tensors, or lazy slices that take the same indices."""

    name: str

    @abstractmethod
    def shard(self, sources: Sequence[Any], place: ShardSpec) -> torch.Tensor:
        """This rank's parameter from whole Hugging Face tensors; reads no more of them than it needs."""

    @abstractmethod
    def merge(self, shards: Sequence[torch.Tensor], place: ShardSpec) -> list[torch.Tensor]:
        """The Hugging Face tensors from the parameter of every rank, in the order of the ranks."""


class ReplicatedMapping(ParamMapping):
    """The same on every rank."""

    name = "replicated"

    def shard(self, sources: Sequence[Any], place: ShardSpec) -> torch.Tensor:
        return sources[0][:]

    def merge(self, shards: Sequence[torch.Tensor], place: ShardSpec) -> list[torch.Tensor]:
        return [shards[0]]


class ColumnParallelMapping(ParamMapping):
    """Megatron's column-parallel layers hold a range of output features: rows of the weight, a part of the bias."""

    name = "column"

    def shard(self, sources: Sequence[Any], place: ShardSpec) -> torch.Tensor:
        return _range(sources[0], place)

    def merge(self, shards: Sequence[torch.Tensor], place: ShardSpec) -> list[torch.Tensor]:
        return [_joined(shards)]


class RowParallelMapping(ParamMapping):
    """Megatron's row-parallel layers hold a range of input features: columns of the weight."""

    name = "row"

    def shard(self, sources: Sequence[Any], place: ShardSpec) -> torch.Tensor:
        count = _shape(sources[0])[1] // place.tp_size
        return sources[0][:, place.tp_rank * count : (place.tp_rank + 1) * count]

    def merge(self, shards: Sequence[torch.Tensor], place: ShardSpec) -> list[torch.Tensor]:
        return [_joined(shards, dim=1)]


class GatedMLPMapping(ParamMapping):
    """gate | up: each is cut by itself, so that a rank multiplies the features of one with the same of the other."""

    name = "gated mlp"

    def shard(self, sources: Sequence[Any], place: ShardSpec) -> torch.Tensor:
        return torch.cat([_range(source, place) for source in sources])

    def merge(self, shards: Sequence[torch.Tensor], place: ShardSpec) -> list[torch.Tensor]:
        return [_joined(part) for part in zip(*(shard.chunk(2) for shard in shards), strict=True)]


class QKVMapping(ParamMapping):
    """q, k, v → for each query group the rows of its query heads, of its key, of its value; ranks hold whole groups.

    Holds for weights [rows, hidden] and biases [rows].
    """

    name = "qkv"

    def shard(self, sources: Sequence[Any], place: ShardSpec) -> torch.Tensor:
        groups = place.sizes["groups"] // place.tp_size
        parts = [_range(source, place) for source in sources]
        parts = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        joined = torch.cat(parts, dim=1)
        return joined.reshape(-1, *joined.shape[2:])

    def merge(self, shards: Sequence[torch.Tensor], place: ShardSpec) -> list[torch.Tensor]:
        joined = _joined(shards)
        joined = joined.reshape(place.sizes["groups"], -1, *joined.shape[1:])
        head = place.sizes["head_dim"]
        parts = joined.split([joined.shape[1] - 2 * head, head, head], dim=1)
        return [part.reshape(-1, *part.shape[2:]) for part in parts]


class VocabParallelMapping(ParamMapping):
    """A range of the vocabulary's rows, padded with rows of zeros to Megatron's size."""

    name = "vocabulary"

    def shard(self, sources: Sequence[Any], place: ShardSpec) -> torch.Tensor:
        count = place.padded_vocab_size // place.tp_size
        start, end = place.tp_rank * count, min((place.tp_rank + 1) * count, place.sizes["vocab"])
        if start >= end:  # nothing but padding
            row = sources[0][0:1]
            return row.new_zeros(count, *row.shape[1:])
        rows = sources[0][start:end]
        return torch.cat([rows, rows.new_zeros(count - (end - start), *rows.shape[1:])])

    def merge(self, shards: Sequence[torch.Tensor], place: ShardSpec) -> list[torch.Tensor]:
        return [_joined(shards)[: place.sizes["vocab"]]]


REPLICATED, COLUMN, ROW, GATED_MLP, QKV, VOCAB = (
    ReplicatedMapping(),
    ColumnParallelMapping(),
    RowParallelMapping(),
    GatedMLPMapping(),
    QKVMapping(),
    VocabParallelMapping(),
)


class PermutedRows:
    """A lazy tensor whose rows are another's in an exchanged order: row i is the other's row `rows.get(i, i)`."""

    def __init__(self, source: Any, rows: Mapping[int, int]) -> None:
        self.source = source
        self.rows = rows

    def __getitem__(self, index: slice) -> torch.Tensor:
        out = self.source[index].clone()
        start = index.start or 0
        for row, origin in self.rows.items():
            if start <= row < start + len(out):
                out[row - start] = self.source[origin : origin + 1][0]
        return out


@dataclass(frozen=True)
class MappedParam:
    """One parameter: its Megatron name, its cut, and its Hugging Face tensors with their shapes.

    layer, expert: the numbers, in the whole model, of the layer and of the expert that it belongs to.
    """

    megatron_name: str
    mapping: ParamMapping
    hf_tensors: tuple[tuple[str, tuple[int, ...]], ...]
    layer: int | None = None
    expert: int | None = None


class MappingRule:
    """A line of a family's table: `Rule(QKV, "decoder.layers.{layer}…", ("model.layers.{layer}…", "q hidden"), …)`.

    `{layer}` in the names runs over the layers, `{expert}` over the experts of each. A shape is the names of its sizes,
    outermost first.
    """

    def __init__(self, cut: ParamMapping, megatron: str, *sources: tuple[str, str]) -> None:
        self.cut = cut
        self.megatron = megatron
        self.sources = sources

    def has_index(self, number: str) -> bool:
        """Whether there is one of it for every `layer`, or for every `expert`."""
        return f"{{{number}}}" in self.megatron

    def expand(self, sizes: Mapping[str, int], layer: int | None = None, expert: int | None = None) -> MappedParam:
        """The rule in one layer, or outside of them; for one expert, or for none."""
        sources = (
            (name.format(layer=layer, expert=expert), tuple(sizes[size] for size in shape.split()))
            for name, shape in self.sources
        )
        return MappedParam(self.megatron.format(layer=layer, expert=expert), self.cut, tuple(sources), layer, expert)


def head_dim(config: Any) -> int:
    """Features of one attention head; configurations may leave it to be the hidden size's share."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def dense_sizes(config: Any) -> dict[str, int]:
    """The sizes that a decoder's shapes are made of, by the names that the rules use."""
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "ffn": config.intermediate_size,
        "groups": config.num_key_value_heads,
        "head_dim": head_dim(config),
        "q": config.num_attention_heads * head_dim(config),
        "kv": config.num_key_value_heads * head_dim(config),
        "vocab": config.vocab_size,
    }


@dataclass(frozen=True)
class Family:
    """The mapping of one architecture, by the name that config.json gives it.

    settings: what of Megatron-Core's TransformerConfig is this family's own, from the configuration.
    required: keys of the configuration, each with the one value that the mapping holds for.
    """

    architecture: str
    rules: tuple[MappingRule, ...]
    sizes: Callable[[Any], dict[str, int]] = dense_sizes
    settings: Callable[[Any], dict[str, Any]] = lambda config: {}
    required: Mapping[str, Any] = field(default_factory=dict)

    def params(self, config: Any, *, own_output: bool) -> list[MappedParam]:
        """Every parameter of the model, layer by layer. own_output: it has an output layer beside its embedding.

        Where the configuration ties the two, an output layer of its own is filled from the embedding.
        """
        entries = self._table(config)
        if not own_output:
            del entries[OUTPUT]
        elif config.tie_word_embeddings:
            entries[OUTPUT] = replace(entries[OUTPUT], hf_tensors=entries[EMBEDDING].hf_tensors)
        return list(entries.values())

    def _table(self, config: Any) -> dict[str, MappedParam]:
        sizes = self.sizes(config)
        found: list[MappedParam] = []
        for in_layers, rules in itertools.groupby(self.rules, key=lambda rule: rule.has_index("layer")):
            run = list(rules)
            for layer in range(sizes["layers"]) if in_layers else [None]:
                for rule in run:
                    experts = range(sizes["experts"]) if rule.has_index("expert") else [None]
                    found += [rule.expand(sizes, layer, expert) for expert in experts]
        return {entry.megatron_name: entry for entry in found}

    def hf_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a folder with this configuration must hold, and no other."""
        entries = self.params(config, own_output=not config.tie_word_embeddings)
        return {name: shape for entry in entries for name, shape in entry.hf_tensors}

    def tied_copies(self, config: Any) -> dict[str, str]:
        """Tensors that a folder may hold although they are copies: the tied output layer → the embedding."""
        if not config.tie_word_embeddings:
            return {}
        entries = self._table(config)
        return {entries[OUTPUT].hf_tensors[0][0]: entries[EMBEDDING].hf_tensors[0][0]}


def _joined(shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The shards side by side; a single one as it is, without a copy."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=dim)


def _shape(source: Any) -> Sequence[int]:
    return source.shape if isinstance(source, torch.Tensor) else source.get_shape()


def _range(source: Any, place: ShardSpec) -> torch.Tensor:
    count = _shape(source)[0] // place.tp_size
    return source[place.tp_rank * count : (place.tp_rank + 1) * count]
