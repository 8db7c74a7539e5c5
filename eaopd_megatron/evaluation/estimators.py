"""What the samples of a benchmark say: avg@k, the unbiased pass@k, and an interval over problems.

All functions work on many problems at once: `c[i]` of problem i's `n` independent samples are right.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def avg_at_k(counts: ArrayLike, n: int) -> FloatArray:
    """Share of right samples of each problem, counts / n; shape of `counts`. ValueError for a count outside 0..n."""
    return _checked_counts(counts, n) / n


def pass_at_k(n: int, c: ArrayLike, k: int) -> FloatArray:
    """Chance that k of a problem's n samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for the pass@k of fresh samples (Chen et al. 2021, equation 1). The binomials are whole numbers and the one
    division is correctly rounded, so nothing cancels or overflows for any n. Shape of `c`. ValueError unless
    1 <= k <= n and every count lies in 0..n.
    """
    counts = _checked_counts(c, n)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and there are n = {n} samples")
    total = math.comb(n, k)
    by_count = {count: (total - math.comb(n - count, k)) / total for count in np.unique(counts).tolist()}
    return np.array([by_count[count] for count in counts.ravel().tolist()], dtype=np.float64).reshape(counts.shape)


def pass_ks(n: int) -> list[int]:
    """The k at which pass@k is reported for n samples: 1, 2, 4, ... and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n}) if n > 0 else []


def majority(keys: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Whether the answer that most samples give is right; of several such answers, the share that is. A sample that
    gives none (key None) has no vote; 0 where none has."""
    votes = Counter(key for key in keys if key is not None)
    most = max(votes.values(), default=0)
    leaders = [key for key, count in votes.items() if count == most]
    right = {key for key, is_right in zip(keys, correct, strict=True) if is_right}
    return sum(key in right for key in leaders) / len(leaders) if leaders else 0.0


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [problems] over problems; the same for the same seed.

    Two calls with the same seed and number of problems draw the same problems, so intervals of differences are paired.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a bootstrap needs a list of at least one value, not shape {array.shape}")
    return _interval(_resampled_means(array, resamples, seed), level)


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % bootstrap interval over problems."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out 0: of a difference, that it has a sign."""
        return self.low > 0 or self.high < 0


def estimate_mean(values: FloatArray) -> Estimate:
    """Mean of values [problems] with its interval."""
    return estimate_mean_of_groups([values])


def estimate_mean_of_groups(groups: Sequence[FloatArray]) -> Estimate:
    """Mean of the groups' means, each group [problems] resampled by itself: an average over benchmarks."""
    low, high = _interval(np.mean([_resampled_means(values, 2000, seed) for seed, values in enumerate(groups)], 0))
    return Estimate(float(np.mean([values.mean() for values in groups])), low, high)


def _resampled_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    return _resampling_weights(values.size, resamples, seed) @ values


def _interval(means: FloatArray, level: float = 0.95) -> tuple[float, float]:
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


@functools.lru_cache(maxsize=8)
def _resampling_weights(problems: int, resamples: int, seed: int) -> FloatArray:
    """Weight of each problem in each resample [resamples, problems]; rows sum to 1."""
    draws = np.random.default_rng(seed).multinomial(problems, np.full(problems, 1.0 / problems), size=resamples)
    return draws.astype(np.float64) / problems


def _checked_counts(counts: ArrayLike, n: int) -> IntArray:
    array = np.asarray(counts)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"counts of right samples must be whole numbers, not {array.dtype}")
    array = array.astype(np.int64)
    if n < 1 or (array.size and not 0 <= int(array.min()) <= int(array.max()) <= n):
        raise ValueError(f"counts of right samples must lie in 0..n with n >= 1; n = {n}, counts = {array.tolist()}")
    return array
