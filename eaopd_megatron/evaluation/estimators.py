"""Estimators over a benchmark's samples: avg@k, pass@k, the majority vote, and bootstrap intervals over problems.

Counts are arrays over problems: `counts[i]` of problem i's `n` independent samples are right.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_RESAMPLES = 2000
_LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over problems with its 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval; for a difference, whether its sign is certain."""
        return self.low > 0 or self.high < 0


def avg_at_k(counts: ArrayLike, n: int) -> FloatArray:
    """Return the share of right samples per problem, counts / n. Raise ValueError for a count outside 0..n."""
    return _checked_counts(counts, n) / n


def pass_at_k(n: int, counts: ArrayLike, k: int) -> FloatArray:
    """Return per problem the chance that k of its n samples, drawn without replacement, hold a right one.

        pass@k = 1 - C(n - c, k) / C(n, k)

    This is the unbiased estimator of Chen et al. 2021, equation 1. The binomials are exact integers and the one
    division is correctly rounded, so nothing cancels or overflows for any n. Raise ValueError unless 1 <= k <= n and
    every count lies in 0..n.
    """
    array = _checked_counts(counts, n)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and there are n = {n} samples")
    total = math.comb(n, k)
    by_count = {count: (total - math.comb(n - count, k)) / total for count in np.unique(array).tolist()}
    return np.array([by_count[count] for count in array.ravel().tolist()], dtype=np.float64).reshape(array.shape)


def pass_ks(n: int) -> list[int]:
    """Return the k at which pass@k is reported for n samples: 1, 2, 4, ... and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n}) if n > 0 else []


def majority(keys: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Return 1 if a problem's most frequent answer is right, 0 if not; among ties, the share that is right.

    Samples without an answer (key None) have no vote; without any vote the result is 0.
    """
    votes = Counter(key for key in keys if key is not None)
    most = max(votes.values(), default=0)
    leaders = [key for key, count in votes.items() if count == most]
    right = {key for key, is_right in zip(keys, correct, strict=True) if is_right}
    return sum(key in right for key in leaders) / len(leaders) if leaders else 0.0


def estimate_mean(values: FloatArray) -> Estimate:
    """Return the mean of `values` [problems] with its percentile bootstrap interval.

    Equally many problems are resampled alike, so the interval of a difference is paired.
    """
    return estimate_mean_of_groups([values])


def estimate_mean_of_groups(groups: Sequence[FloatArray]) -> Estimate:
    """Return the mean of the groups' means, resampling each group [problems] on its own: an average over benchmarks."""
    means = np.mean([_resampling_weights(values.size, seed) @ values for seed, values in enumerate(groups)], 0)
    tail = (1.0 - _LEVEL) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Estimate(float(np.mean([values.mean() for values in groups])), float(low), float(high))


@functools.lru_cache(maxsize=8)
def _resampling_weights(problems: int, seed: int) -> FloatArray:
    """Weight of each problem in each resample, [resamples, problems]; rows sum to 1."""
    draws = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1.0 / problems), size=_RESAMPLES)
    return draws.astype(np.float64) / problems


def _checked_counts(counts: ArrayLike, n: int) -> IntArray:
    array = np.asarray(counts)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"counts of right samples must be integers, not {array.dtype}")
    array = array.astype(np.int64)
    if n < 1 or (array.size and not 0 <= int(array.min()) <= int(array.max()) <= n):
        raise ValueError(f"counts of right samples must lie in 0..n with n >= 1; n = {n}, counts = {array.tolist()}")
    return array
