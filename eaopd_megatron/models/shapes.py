"""What a Hugging Face configuration says of a model's size: exact parameter counts, whole and on each rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.planning.layouts import PlannedLayout

VOCAB_DIVISOR = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of 128 · tensor_parallel (Megatron's rule).

    151,936 stays at tensor_parallel 1 and becomes 152,064 at 2 and 152,064 at 4.
    """
    multiple = VOCAB_DIVISOR * tensor_parallel
    return (vocab_size + multiple - 1) // multiple * multiple


MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class ParameterCounts:
    """Counts of weights. Those of experts are spread over other ranks than the rest."""

    dense: int = 0
    expert: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.expert

    def __add__(self, other: ParameterCounts) -> ParameterCounts:
        return ParameterCounts(self.dense + other.dense, self.expert + other.expert)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with grouped-query attention, RMSNorm and gated MLPs, dense or of experts."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    expert_layers: frozenset[int] = frozenset()  # numbers of the layers that have experts

    @classmethod
    def of(cls, config: Any, label: str = "model") -> ModelShape:
        """From the object in a config.json, or transformers' configuration. UserError where a size is missing."""
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        kind = values.get("model_type")
        if kind not in MODEL_TYPES:
            raise UserError(f"{label}: model_type {kind!r} cannot be planned; supported: {', '.join(MODEL_TYPES)}")

        def size(name: str, default: int | None = None) -> int:
            value = values.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{label}: config.json has {name}={value!r}; it must be a whole number from 1")
            return value

        layers, heads, hidden = size("num_hidden_layers"), size("num_attention_heads"), size("hidden_size")
        moe = kind == "qwen3_moe"
        step, plain = (size("decoder_sparse_step", 1), set(values.get("mlp_only_layers") or ())) if moe else (1, set())
        return cls(
            model_type=kind,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            intermediate=size("intermediate_size"),
            vocab=size("vocab_size"),
            tied=bool(values.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bool(values.get("attention_bias", False)),
            qk_norm=kind.startswith("qwen3"),
            experts=size("num_experts", values.get("num_local_experts")) if moe else 0,  # transformers 5 renames it
            experts_per_token=size("num_experts_per_tok") if moe else 0,
            expert_intermediate=size("moe_intermediate_size") if moe else 0,
            expert_layers=frozenset(i for i in range(layers) if moe and i not in plain and (i + 1) % step == 0),
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of keys, and of values."""
        return self.kv_heads * self.head_dim

    @property
    def attention_weights(self) -> int:
        """Elements of a layer's attention matrices."""
        return self.hidden * (2 * self.query_width + 2 * self.kv_width)

    def hf_parameters(self) -> ParameterCounts:
        """The model's own parameters, as a Hugging Face folder holds them."""
        single = PlannedLayout()
        found = self.embedding(self.vocab) + ParameterCounts(self.hidden)
        if not self.tied:
            found += self.embedding(self.vocab)
        for layer in range(self.layers):
            found += self.layer_parameters(layer, single)
        return found

    def active_parameters(self) -> int:
        """Parameters that one token meets."""
        whole = self.hf_parameters()
        return whole.dense + (whole.expert * self.experts_per_token // self.experts if self.experts else 0)

    def rank_parameters(self, layout: PlannedLayout, stage: int, output_vocab: int | None = None) -> ParameterCounts:
        """What a rank of this pipeline stage holds: vocabulary padded, tied embeddings twice over several stages.

        output_vocab: the vocabulary size of which the output layer's rows are; none: the model's own.
        """
        found = ParameterCounts()
        for layer in layout.layers_of(stage, self.layers):
            found += self.layer_parameters(layer, layout)
        rows = padded_vocab_size(self.vocab, layout.tensor_parallel) // layout.tensor_parallel
        output = padded_vocab_size(output_vocab or self.vocab, layout.tensor_parallel) // layout.tensor_parallel
        last = stage == layout.pipeline_parallel - 1
        if stage == 0:
            found += self.embedding(rows)
        if last:
            found += ParameterCounts(self.hidden)
            if not self.tied or stage > 0 or output != rows:
                found += self.embedding(output)
        return found

    def embedding(self, rows: int) -> ParameterCounts:
        """An embedding, or an output layer, of so many rows."""
        return ParameterCounts(rows * self.hidden)

    def layer_parameters(self, number: int, layout: PlannedLayout) -> ParameterCounts:
        """A rank's part of a transformer layer."""
        tp = layout.tensor_parallel
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        bias = (self.query_width + 2 * self.kv_width) // tp if self.qkv_bias else 0
        dense = self.attention_weights // tp + norms + bias
        if number not in self.expert_layers:
            return ParameterCounts(dense + 3 * self.hidden * self.intermediate // tp)
        held = self.experts // layout.expert_parallel
        each = 3 * self.hidden * self.expert_intermediate // layout.expert_tensor_parallel
        return ParameterCounts(dense + self.hidden * self.experts, held * each)
