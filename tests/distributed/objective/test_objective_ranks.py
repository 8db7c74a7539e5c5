"""The objective on 2 and 4 tensor-parallel ranks against the dense fp64 oracle, values and gradients.

A loss that matches under tensor parallelism proves nothing: implementations with right values and wrong gradients
exist.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import RankFailure, Ranks, checks_in

CHECKS = Path(__file__).with_name("checks_ranks.py")
LINEAR_CHECKS = Path(__file__).with_name("checks_linear.py")
WITH_ARGUMENTS = ("check_preset", "check_variants", "check_failure", "check_crash")
LINEAR_WITH_ARGUMENTS = ("check_linear_presets", "check_linear_variants")


@pytest.fixture(scope="module", params=["two_ranks", "ranks"], ids=["2-ranks", "4-ranks"])
def sized_ranks(request: pytest.FixtureRequest) -> Ranks:
    started: Ranks = request.getfixturevalue(request.param)
    return started


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("signal", ["logits", "topk"])
@pytest.mark.parametrize("preset", ["opd", "eopd"])
def test_preset_has_the_oracles_values_and_gradients(sized_ranks: Ranks, preset: str, signal: str, dtype: str) -> None:
    sized_ranks.run(CHECKS, "check_preset", preset=preset, signal=signal, dtype=dtype)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("signal", ["logits", "topk"])
def test_every_variant_has_the_oracles_values_and_gradients(sized_ranks: Ranks, signal: str, dtype: str) -> None:
    sized_ranks.run(CHECKS, "check_variants", signal=signal, dtype=dtype)


@pytest.mark.parametrize("check", [name for name in checks_in(CHECKS) if name not in WITH_ARGUMENTS])
def test_on_ranks(sized_ranks: Ranks, check: str) -> None:
    sized_ranks.run(CHECKS, check)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("signal", ["hidden", "topk"])
def test_linear_presets_have_the_oracles_values_and_gradients(sized_ranks: Ranks, signal: str, dtype: str) -> None:
    sized_ranks.run(LINEAR_CHECKS, "check_linear_presets", signal=signal, dtype=dtype)


@pytest.mark.parametrize("signal", ["hidden", "topk"])
def test_every_linear_variant_has_the_oracles_values_and_gradients(sized_ranks: Ranks, signal: str) -> None:
    sized_ranks.run(LINEAR_CHECKS, "check_linear_variants", signal=signal)


@pytest.mark.parametrize("check", [name for name in checks_in(LINEAR_CHECKS) if name not in LINEAR_WITH_ARGUMENTS])
def test_linear_on_ranks(sized_ranks: Ranks, check: str) -> None:
    sized_ranks.run(LINEAR_CHECKS, check)


def test_a_failure_on_one_rank_is_reported_and_leaves_the_ranks_usable(sized_ranks: Ranks) -> None:
    """A harness that swallowed a rank's failure would make every test above pass."""
    for rank in range(2):
        with pytest.raises(RankFailure, match=f"rank {rank} raised(.|\n)*rank {rank} fails alone"):
            sized_ranks.run(CHECKS, "check_failure", rank=rank)
        sized_ranks.run(CHECKS, "check_failure", rank=None)


def test_a_crash_passes_unseen_or_one_of_gloo_fails_a_check(sized_ranks: Ranks, tmp_path: Path) -> None:
    """A rank that has a segmentation fault every time fails; one that had it once does not."""
    counter = tmp_path / "crashes"
    counter.touch()
    sized_ranks.run(CHECKS, "check_crash", counter=str(counter), times=1)
    with pytest.raises(RankFailure, match="died with exit code -11"):
        sized_ranks.run(CHECKS, "check_crash", counter=str(counter), times=4)
    assert len(counter.read_text()) == 4
    sized_ranks.run(CHECKS, "check_failure", rank=None)
