"""Sizes and exact parameter counts of a model, of the complete one and of each rank's part. Without torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.families import FAMILIES, family_of
from eaopd_megatron.models.mapping import EMBEDDING, OUTPUT, Family, MappingRule, config_values

_VOCAB_DIVISOR = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Return the rows of the embedding over all ranks: the next multiple of 128 · tensor_parallel (Megatron's rule).

    151,936 stays at tensor_parallel 1 and becomes 152,064 at 2 and 152,064 at 4.
    """
    multiple = _VOCAB_DIVISOR * tensor_parallel
    return (vocab_size + multiple - 1) // multiple * multiple


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of weights; those of experts are sharded over other ranks than the dense ones."""

    dense: int = 0
    expert: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.expert

    def __add__(self, other: ParameterCounts) -> ParameterCounts:
        return ParameterCounts(self.dense + other.dense, self.expert + other.expert)

    def __mul__(self, times: int) -> ParameterCounts:
        return ParameterCounts(self.dense * times, self.expert * times)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with grouped-query attention, RMSNorm and gated MLPs, dense or of experts."""

    architecture: str
    tied: bool
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    query_width: int
    kv_width: int  # of the keys, and of the values
    intermediate: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    positions: int | None = None  # `max_positions` of its config.json, where that was read

    @classmethod
    def of(cls, config: Any, label: str = "model") -> ModelShape:
        """Read a parsed config.json, or transformers' configuration.

        Raises UserError for an unknown architecture and for a missing size.
        """
        values = config_values(config)
        family = family_of(values.get("architectures"), label)
        try:
            return cls(family.architecture, bool(values.get("tie_word_embeddings", False)), **family.sizes(values))
        except ValueError as error:
            raise UserError(f"{label}: {error}") from None

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def qk_norm(self) -> bool:
        return any("q_layernorm" in rule.megatron_name for rule in self.family.rules)

    @property
    def expert_layers(self) -> int:
        """Number of layers that have experts: all or none."""
        return self.layers if self.experts else 0

    def hf_parameters(self) -> ParameterCounts:
        """Count the model's own parameters, as a Hugging Face folder holds them."""
        outer = self._count(rule for rule in self._outer if not (self.tied and rule.megatron_name == OUTPUT))
        return outer + self.layer_parameters(ParallelLayout()) * self.layers

    def active_parameters(self) -> int:
        """Count the parameters that take part in the computation of one token."""
        counts = self.hf_parameters()
        return counts.dense + (counts.expert * self.experts_per_token // self.experts if self.experts else 0)

    def rank_parameters(self, layout: ParallelLayout, stage: int, output_vocab: int | None = None) -> ParameterCounts:
        """Count what a rank of this pipeline stage holds, with padded vocabulary.

        Tied embeddings are held twice over several stages. output_vocab: the vocabulary size that the output layer is
        made for; None: the model's own.
        """
        rows = padded_vocab_size(self.vocab, layout.tensor_parallel)
        output_rows = padded_vocab_size(output_vocab or self.vocab, layout.tensor_parallel)
        found = self.layer_parameters(layout) * len(layout.layers_of(stage, self.layers))
        for rule in self._outer:
            if rule.megatron_name == EMBEDDING:
                if stage == 0:
                    found += self._count([rule], layout, rows)
            elif stage < layout.pipeline_parallel - 1:
                continue
            elif rule.megatron_name != OUTPUT or not self.tied or stage > 0 or output_rows != rows:
                found += self._count([rule], layout, output_rows)
        return found

    def layer_parameters(self, layout: ParallelLayout) -> ParameterCounts:
        """Count a rank's part of one transformer layer."""
        return self._count((rule for rule in self.family.rules if rule.has_index("layer")), layout)

    @property
    def _outer(self) -> list[MappingRule]:
        return [rule for rule in self.family.rules if not rule.has_index("layer")]

    def _count(
        self, rules: Iterable[MappingRule], layout: ParallelLayout | None = None, vocab: int | None = None
    ) -> ParameterCounts:
        """Count a rank's part of the rules' parameters. vocab: rows of a vocabulary, padded; None: as they are."""
        layout = layout or ParallelLayout()
        sizes: Mapping[str, Any] = {**vars(self), "vocab": vocab or self.vocab}
        dense = expert = 0
        for rule in rules:
            count = sum(math.prod(shape) for shape in rule.shapes(sizes))
            if rule.has_index("expert"):
                local_experts = self.experts // layout.expert_parallel
                expert += local_experts * (count // layout.expert_tensor_parallel)
            else:
                dense += count // (layout.tensor_parallel if rule.mapping.sharded else 1)
        return ParameterCounts(dense, expert)
