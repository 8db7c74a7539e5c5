"""The cuts between Hugging Face tensors and Megatron-Core's shards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from eaopd_megatron.models.mapping import (
    COLUMN,
    GATED_MLP,
    OUTPUT,
    QKV,
    REPLICATED,
    ROW,
    VOCAB,
    Family,
    MappingRule,
    ParamMapping,
    PermutedRows,
    ShardSpec,
)

SIZES = {"kv_heads": 4, "head_dim": 3, "vocab": 10}
Q, KV = 8 * 3, 4 * 3  # two query heads a group


def shards(mapping: ParamMapping, sources: Sequence[Any], ranks: int, padded_vocab: int = 16) -> list[torch.Tensor]:
    return [mapping.shard(sources, ShardSpec(rank, ranks, SIZES, padded_vocab)) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("mapping", "shapes"),
    [
        (REPLICATED, [(5,)]),
        (COLUMN, [(8, 5)]),
        (COLUMN, [(8,)]),
        (ROW, [(5, 8)]),
        (GATED_MLP, [(8, 5), (8, 5)]),
        (QKV, [(Q, 5), (KV, 5), (KV, 5)]),
        (QKV, [(Q,), (KV,), (KV,)]),  # biases
        (VOCAB, [(10, 5)]),
    ],
)
def test_what_is_cut_is_merged_to_the_same_bits(
    mapping: ParamMapping, shapes: list[tuple[int, ...]], ranks: int
) -> None:
    sources = [torch.randn(shape) for shape in shapes]
    merged = mapping.merge(shards(mapping, sources, ranks), ShardSpec(0, ranks, SIZES, 16))
    assert len(merged) == len(sources)
    assert all(torch.equal(one, other) for one, other in zip(merged, sources, strict=True))


def test_a_rank_holds_its_query_groups_each_as_queries_key_value() -> None:
    """q, k, v cut one after another would give a rank the queries of one group and the keys of another."""
    q, k, v = torch.arange(Q), 100 + torch.arange(KV), 200 + torch.arange(KV)
    second = shards(QKV, [q, k, v], 2)[1]
    expected = [*q[12:18], *k[6:9], *v[6:9], *q[18:24], *k[9:12], *v[9:12]]
    assert second.tolist() == [int(x) for x in expected]


def test_gate_and_up_are_split_before_they_are_cut() -> None:
    """The concatenation cut in two would give one rank the whole gate and the other the whole up projection."""
    gate, up = torch.arange(8), 100 + torch.arange(8)
    assert shards(GATED_MLP, [gate, up], 2)[0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]


def test_ranks_beyond_the_vocabulary_hold_zeros() -> None:
    """At 4 ranks of 4 rows a vocabulary of 10 ends inside the third, and the fourth has no valid row."""
    rows = torch.randn(10, 5)
    parts = shards(VOCAB, [rows], 4)
    assert [tuple(part.shape) for part in parts] == [(4, 5)] * 4
    assert torch.equal(torch.cat(parts), torch.cat([rows, torch.zeros(6, 5)]))


def test_swapped_rows_are_swapped_in_every_slice() -> None:
    """A swap whose two rows lie on different ranks must reach both."""
    rows = torch.randn(10, 5)
    swapped = PermutedRows(rows, {1: 9, 9: 1})
    expected = rows[[0, 9, 2, 3, 4, 5, 6, 7, 8, 1]]
    for start, end in itertools.combinations(range(11), 2):
        assert torch.equal(swapped[start:end], expected[start:end])
    assert torch.equal(shards(VOCAB, [swapped], 4)[2], torch.cat([expected[8:], torch.zeros(2, 5)]))


class Toy(Family):
    def sizes(self, config: Any) -> dict[str, int]:
        return {**SIZES, "layers": 2}


def test_an_output_layer_of_its_own_is_filled_from_the_tied_embedding() -> None:
    """A tied teacher with mapped output rows has no lm_head to read."""
    family = Toy(
        "Toy",
        (
            MappingRule(VOCAB, "embedding.word_embeddings.weight", ("embed", "vocab")),
            MappingRule(REPLICATED, "a.{layer}", ("hf.{layer}.a", "head_dim")),
            MappingRule(REPLICATED, "b.{layer}", ("hf.{layer}.b", "head_dim")),
            MappingRule(VOCAB, OUTPUT, ("head", "vocab")),
        ),
    )

    def sources(tied: bool, own_output: bool) -> dict[str, str]:
        params = family.params({"tie_word_embeddings": tied}, own_output=own_output)
        return {param.megatron_name: param.hf_tensors[0][0] for param in params}

    assert OUTPUT not in sources(tied=True, own_output=False)
    assert sources(tied=True, own_output=True)[OUTPUT] == "embed"
    assert sources(tied=False, own_output=True)[OUTPUT] == "head"
    names = list(family.hf_shapes({"tie_word_embeddings": False}))
    assert names == ["embed", "hf.0.a", "hf.0.b", "hf.1.a", "hf.1.b", "head"]
    assert "head" not in family.hf_shapes({"tie_word_embeddings": True})
