"""Mappings between Hugging Face tensors and the shards of Megatron-Core's parameters.

A family of models is a table of rules: a Megatron name, how the parameter is sharded, the Hugging Face tensors it is
made of and their shapes. Import, export and the counts of `shapes` use the same table. Importing it needs no torch.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class ShardSpec:
    """One shard of a parameter, and the model's sizes by the names that the rules use.

    tp_rank and tp_size are those of the tensor-parallel group; for experts of the expert-tensor-parallel group.
    """

    tp_rank: int
    tp_size: int
    sizes: Mapping[str, int]
    padded_vocab_size: int


class ParamMapping(ABC):
    """One way to shard a parameter. Hugging Face tensors are tensors, or lazy slices that take the same indices."""

    name: str
    sharded: bool = True

    @abstractmethod
    def shard(self, tensors: Sequence[Any], spec: ShardSpec) -> torch.Tensor:
        """Return one rank's parameter; read no more of the Hugging Face tensors than it needs."""

    @abstractmethod
    def merge(self, shards: Sequence[torch.Tensor], spec: ShardSpec) -> list[torch.Tensor]:
        """Return the Hugging Face tensors, given the parameter of every rank in rank order."""


class ReplicatedMapping(ParamMapping):
    """The same on every rank."""

    name = "replicated"
    sharded = False

    def shard(self, tensors: Sequence[Any], spec: ShardSpec) -> torch.Tensor:
        return tensors[0][:]

    def merge(self, shards: Sequence[torch.Tensor], spec: ShardSpec) -> list[torch.Tensor]:
        return [shards[0]]


class ColumnParallelMapping(ParamMapping):
    """Megatron's column-parallel layers hold a range of output features: rows of the weight, a part of the bias."""

    name = "column"

    def shard(self, tensors: Sequence[Any], spec: ShardSpec) -> torch.Tensor:
        return _rows(tensors[0], spec)

    def merge(self, shards: Sequence[torch.Tensor], spec: ShardSpec) -> list[torch.Tensor]:
        return [_cat(shards)]


class RowParallelMapping(ParamMapping):
    """Megatron's row-parallel layers hold a range of input features: columns of the weight."""

    name = "row"

    def shard(self, tensors: Sequence[Any], spec: ShardSpec) -> torch.Tensor:
        count = _shape(tensors[0])[1] // spec.tp_size
        return tensors[0][:, spec.tp_rank * count : (spec.tp_rank + 1) * count]

    def merge(self, shards: Sequence[torch.Tensor], spec: ShardSpec) -> list[torch.Tensor]:
        return [_cat(shards, dim=1)]


class GatedMLPMapping(ParamMapping):
    """gate | up, each sharded by itself, so that a rank multiplies matching features of the two."""

    name = "gated mlp"

    def shard(self, tensors: Sequence[Any], spec: ShardSpec) -> torch.Tensor:
        return _cat([_rows(tensor, spec) for tensor in tensors])

    def merge(self, shards: Sequence[torch.Tensor], spec: ShardSpec) -> list[torch.Tensor]:
        return [_cat(part) for part in zip(*(shard.chunk(2) for shard in shards), strict=True)]


class QKVMapping(ParamMapping):
    """q, k, v interleaved by query group: its query heads, its key, its value. Ranks hold complete groups.

    For weights [rows, hidden] and biases [rows].
    """

    name = "qkv"

    def shard(self, tensors: Sequence[Any], spec: ShardSpec) -> torch.Tensor:
        groups = spec.sizes["kv_heads"] // spec.tp_size
        parts = [_rows(tensor, spec) for tensor in tensors]
        fused = _cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1)
        return fused.reshape(-1, *fused.shape[2:])

    def merge(self, shards: Sequence[torch.Tensor], spec: ShardSpec) -> list[torch.Tensor]:
        fused = _cat(shards)
        fused = fused.reshape(spec.sizes["kv_heads"], -1, *fused.shape[1:])
        head = spec.sizes["head_dim"]
        parts = fused.split([fused.shape[1] - 2 * head, head, head], dim=1)
        return [part.reshape(-1, *part.shape[2:]) for part in parts]


class VocabParallelMapping(ParamMapping):
    """A range of the vocabulary's rows, padded with rows of zeros to Megatron's size."""

    name = "vocabulary"

    def shard(self, tensors: Sequence[Any], spec: ShardSpec) -> torch.Tensor:
        count = spec.padded_vocab_size // spec.tp_size
        start, end = spec.tp_rank * count, min((spec.tp_rank + 1) * count, spec.sizes["vocab"])
        if start >= end:  # nothing but padding
            row = tensors[0][0:1]
            return row.new_zeros(count, *row.shape[1:])
        rows = tensors[0][start:end]
        return _cat([rows, rows.new_zeros(count - (end - start), *rows.shape[1:])])

    def merge(self, shards: Sequence[torch.Tensor], spec: ShardSpec) -> list[torch.Tensor]:
        return [_cat(shards)[: spec.sizes["vocab"]]]


REPLICATED, COLUMN, ROW = ReplicatedMapping(), ColumnParallelMapping(), RowParallelMapping()
GATED_MLP, QKV, VOCAB = GatedMLPMapping(), QKVMapping(), VocabParallelMapping()


class PermutedRows:
    """A lazy tensor with exchanged rows: row i is `source[rows.get(i, i)]`."""

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
    """One parameter: its Megatron name, its mapping, and its Hugging Face tensors with their shapes.

    layer and expert are global indices; None outside of layers, or of experts.
    """

    megatron_name: str
    mapping: ParamMapping
    hf_tensors: tuple[tuple[str, tuple[int, ...]], ...]
    layer: int | None = None
    expert: int | None = None


class MappingRule:
    """A line of a family's table: how a Megatron parameter is sharded, and its Hugging Face tensors.

    `{layer}` in the names runs over the layers, `{expert}` over the experts of each. Each tensor's shape lists the
    names of its sizes, outermost first: ("model.embed_tokens.weight", "vocab hidden").
    """

    def __init__(self, mapping: ParamMapping, megatron_name: str, *hf_tensors: tuple[str, str]) -> None:
        self.mapping = mapping
        self.megatron_name = megatron_name
        self.hf_tensors = hf_tensors

    def has_index(self, name: str) -> bool:
        """Return whether there is one such parameter per `layer`, or per `expert`."""
        return f"{{{name}}}" in self.megatron_name

    def shapes(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Return the shapes of its Hugging Face tensors."""
        return [tuple(sizes[size] for size in shape.split()) for _, shape in self.hf_tensors]

    def expand(self, sizes: Mapping[str, int], layer: int | None = None, expert: int | None = None) -> MappedParam:
        """Return the rule's parameter in one layer and for one expert."""
        names = (name.format(layer=layer, expert=expert) for name, _ in self.hf_tensors)
        tensors = tuple(zip(names, self.shapes(sizes), strict=True))
        return MappedParam(self.megatron_name.format(layer=layer, expert=expert), self.mapping, tensors, layer, expert)


def config_values(config: Any) -> Mapping[str, Any]:
    """Return the keys of a configuration: a parsed config.json as it is, transformers' object as a dictionary."""
    return config if isinstance(config, Mapping) else config.to_dict()


@dataclass(frozen=True)
class Family:
    """The mapping of one architecture, by the name that config.json gives it.

    settings: this family's own fields of Megatron-Core's TransformerConfig, from transformers' configuration.
    required: keys of config.json, each with the one value that the mapping holds for.
    defaults: transformers' values of sizes that config.json may omit.
    """

    architecture: str
    rules: tuple[MappingRule, ...]
    settings: Callable[[Any], dict[str, Any]] = lambda config: {}
    required: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)

    @property
    def has_experts(self) -> bool:
        return any(rule.has_index("expert") for rule in self.rules)

    def sizes(self, config: Any) -> dict[str, int]:
        """Return the model's sizes by the names that the rules use. Raises ValueError where one is missing."""
        values = config_values(config)

        def size(*names: str, default: int | None = None) -> int:
            given = {**self.defaults, **values}
            value = next((given[name] for name in names if given.get(name) is not None), default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config.json has {names[0]}={value!r}; it must be a whole number from 1")
            return value

        layers, hidden, heads = size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", default=heads)
        head_dim = size("head_dim", default=hidden // heads)
        found = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        found |= {"query_width": heads * head_dim, "kv_width": kv_heads * head_dim}
        found |= {"intermediate": size("intermediate_size"), "vocab": size("vocab_size")}
        if self.has_experts:
            found["experts"] = size("num_experts", "num_local_experts")  # transformers 5 renames it
            found["experts_per_token"] = size("num_experts_per_tok")
            found["expert_intermediate"] = size("moe_intermediate_size")
        return found

    def params(self, config: Any, *, own_output: bool) -> list[MappedParam]:
        """Return every parameter of the model, layer by layer.

        own_output: the model has an output layer beside its embedding; if config.json ties the two, it is filled from
        the embedding.
        """
        params = self._table(config)
        if not own_output:
            del params[OUTPUT]
        elif _tied(config):
            params[OUTPUT] = replace(params[OUTPUT], hf_tensors=params[EMBEDDING].hf_tensors)
        return list(params.values())

    def _table(self, config: Any) -> dict[str, MappedParam]:
        sizes = self.sizes(config)
        params: list[MappedParam] = []
        for in_layers, group in itertools.groupby(self.rules, key=lambda rule: rule.has_index("layer")):
            rules = list(group)
            for layer in range(sizes["layers"]) if in_layers else [None]:
                for rule in rules:
                    experts = range(sizes["experts"]) if rule.has_index("expert") else [None]
                    params += [rule.expand(sizes, layer, expert) for expert in experts]
        return {param.megatron_name: param for param in params}

    def hf_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that a folder with this configuration must hold, and no other."""
        params = self.params(config, own_output=not _tied(config))
        return {name: shape for param in params for name, shape in param.hf_tensors}

    def tied_copies(self, config: Any) -> dict[str, str]:
        """Return tensors that a folder may hold although they are copies: the tied output layer → the embedding."""
        if not _tied(config):
            return {}
        params = self._table(config)
        return {params[OUTPUT].hf_tensors[0][0]: params[EMBEDDING].hf_tensors[0][0]}


def _tied(config: Any) -> bool:
    return bool(config_values(config).get("tie_word_embeddings", False))


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Concatenate; return a single tensor without a copy."""
    import torch

    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=dim)


def _shape(tensor: Any) -> Sequence[int]:
    return tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape


def _rows(tensor: Any, spec: ShardSpec) -> torch.Tensor:
    count = _shape(tensor)[0] // spec.tp_size
    return tensor[spec.tp_rank * count : (spec.tp_rank + 1) * count]
