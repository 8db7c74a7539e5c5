"""The top-k set must be the same on every layout: larger logit first, then lower id, also where many are equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eaopd_megatron.objective import summarise_teacher, vocab_parallel
from eaopd_megatron.objective.vocab_parallel import VocabShard, shard_top_k, top_k_positions


def stable(logits: Tensor, k: int) -> Tensor:
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 400),
    st.integers(1, 20),
    st.sampled_from([1, 3, 30, 10_000]),
    st.sampled_from([4, 8, 64]),
    st.integers(0, 4),
    st.data(),
)
def test_any_row_agrees_with_a_stable_sort(
    vocab_size: int, k: int, levels: int, block: int, spare: int, data: st.DataObject
) -> None:
    """Small blocks make the search by blocks meet small vocabularies; few levels make ties everywhere."""
    seed = data.draw(st.integers(0, 2**16))
    logits = torch.randint(0, levels, (5, vocab_size + 3), generator=torch.Generator().manual_seed(seed)).float()
    before = vocab_parallel.TOP_K_BLOCK, vocab_parallel.TOP_K_SPARE
    try:
        vocab_parallel.TOP_K_BLOCK, vocab_parallel.TOP_K_SPARE = block, spare
        shard = VocabShard.from_logits("logits", logits, vocab_size, None, data.draw(st.integers(1, 6)))
        ids, values = shard_top_k(logits, shard, k)
    finally:
        vocab_parallel.TOP_K_BLOCK, vocab_parallel.TOP_K_SPARE = before
    kept = min(k, vocab_size)
    assert torch.equal(ids[:, :kept], stable(logits[:, :vocab_size], kept))
    assert torch.equal(values[:, :kept], logits.gather(1, ids[:, :kept]))
    assert (ids[:, kept:] == vocab_size).all() and (values[:, kept:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_wide_row_agrees_with_a_stable_sort(dtype: torch.dtype) -> None:
    """Wide enough for blocks of the real size, with rows of one value and of -inf, and a rest after the last block."""
    logits = (torch.randn(12, 9_999, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    logits[3] = 1.0
    logits[4] = -torch.inf
    logits[4, 5_000] = 0.0
    logits[5, 9_990] = logits[5, 9_997] = 100.0
    shard = VocabShard.from_logits("logits", logits, 9_998, None)
    ids, _ = shard_top_k(logits, shard, 16)
    assert torch.equal(ids, stable(logits[:, :9_998], 16))


def test_nan_is_refused_and_does_not_break_the_search() -> None:
    """The search runs before the check, which needs the reduced sums."""
    logits = torch.zeros(3, 5_000)
    logits[1, ::2] = torch.nan
    with pytest.raises(ValueError, match="logits: row 1 holds NaN"):
        summarise_teacher(logits, torch.zeros(3, dtype=torch.int64), k=16, vocab_size=5_000)


def test_equal_candidates_of_several_ranks_are_settled_by_id() -> None:
    values = torch.tensor([[2.0, 1.0, 2.0, 1.0, -torch.inf, -torch.inf]])
    ids = torch.tensor([[7.0, 1.0, 3.0, 0.0, 9.0, 4.0]])
    order = top_k_positions(values, ids, 5)
    assert ids.gather(1, order).tolist() == [[3, 7, 0, 1, 4]]


def test_logits_that_differ_less_than_their_distance_to_the_maximum_stay_apart() -> None:
    """1e-6 and 2e-6 are the same number once a maximum of 100 is subtracted: the order comes before."""
    logits = torch.tensor([[1e-6, 100.0, 2e-6, 1.5e-6]])
    got = summarise_teacher(logits, torch.tensor([0]), k=3, vocab_size=4)
    assert got.ids.tolist() == [[1, 2, 3]]
