"""Means over diffs with bootstrap 95 % intervals, and paired differences between methods.

The bootstrap is our own: scipy's draws other resamples, and published intervals would change in the last digit.

The diff is the unit of chance: several answers about one diff (wordings of the question) are
averaged first, so that asking a diff more often never makes an interval narrower by itself.
"""

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit_jax.graders.grades import HIGH, LOW

RESAMPLES = 10_000
LEVEL = 0.95
FEW = 10  # with fewer diffs resampling gives intervals that are too narrow
GRADES = HIGH - LOW  # the largest difference of two grades
_CHUNK = 2**22  # resampled values held at once: bounds the memory for thousands of diffs


@dataclass(frozen=True)
class Estimate:
    """A mean over n diffs with its interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over the n diffs that both methods answered, its interval, two-sided p."""

    mean: float
    low: float
    high: float
    n: int
    p_value: float


def cluster_means(values: ArrayLike, clusters: Sequence[Hashable]) -> dict[Hashable, float]:
    """Mean of `values` [N] in each cluster, in order of first appearance.

    Raises:
        ValueError: the lengths differ.
    """
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(np.asarray(values, np.float64).tolist(), clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    return {cluster: float(np.mean(group)) for cluster, group in groups.items()}


def _resampled_means(values: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Means [resamples] of `values` [n] drawn with replacement."""
    if resamples * len(values) <= _CHUNK:
        return _draws(len(values), seed, resamples) @ values / len(values)

    def chunks() -> Iterator[NDArray[np.float64]]:
        rng = np.random.default_rng(seed)
        rows = max(1, _CHUNK // len(values))
        for start in range(0, resamples, rows):
            shape = (min(rows, resamples - start), len(values))
            yield values[rng.integers(len(values), size=shape)].mean(axis=1)

    return np.concatenate(list(chunks()))


@functools.lru_cache(maxsize=2)  # a report has many means over the same diffs
def _draws(n: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """How often each of n values is drawn in each resample, [resamples, n]."""
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    flat = (drawn + n * np.arange(resamples)[:, None]).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _percentiles(values: NDArray[np.float64], means: NDArray[np.float64]) -> tuple[float, float]:
    """The middle `LEVEL` of the resampled means; it always holds the mean itself."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    mean = values.mean()  # equal values resample to a mean that is off by a rounding error
    return float(min(low, mean)), float(max(high, mean))


def _bounded(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """An interval of the mean of values in [0, 1] where resampling says too little, None elsewhere.

    Few values: the means that Hoeffding's inequality (1963, theorem 1) does not exclude, which holds for every
    variable in [0, 1]. Many equal ones: others are at most as frequent as n absences leave possible. For only zeros
    or only ones both are the exact binomial bound of Clopper and Pearson: 0 to .038 for 0 of 96.
    """
    from scipy.optimize import bisect
    from scipy.special import rel_entr
    from scipy.stats import binomtest

    n, mean = len(values), float(values.mean())
    equal = bool(np.all(values == values[0]))
    if n >= FEW and not equal:
        return None
    if equal and (n >= FEW or mean in (0, 1)):
        rest = float(binomtest(0, n).proportion_ci(LEVEL).high)
        return mean * (1 - rest), mean + (1 - mean) * rest
    limit = -math.log((1 - LEVEL) / 2) / n

    def too_far(truth: float) -> float:
        return float(rel_entr(mean, truth) + rel_entr(1 - mean, 1 - truth)) - limit

    return tuple(end if mean == end else bisect(too_far, mean, end) for end in (0.0, 1.0))  # type: ignore[return-value]


def _student(values: NDArray[np.float64]) -> tuple[float, float]:
    """Student's interval: for few values that have no upper end and are never negative.

    One value has none: it is returned as both ends.
    """
    from scipy.stats import t

    n, mean = len(values), float(values.mean())
    if n == 1:
        return mean, mean
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * float(values.std(ddof=1)) / math.sqrt(n)
    return max(0.0, mean - half), mean + half


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array) or not np.all(np.isfinite(array)):
        raise ValueError("a mean needs at least one value, and finite ones")
    return array


def bootstrap_mean(
    values: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    rate: bool = True,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean over diffs with a percentile bootstrap interval over diffs.

    Args:
        values: [N] scores.
        clusters: the diff of each score; None when every score has its own.
        rate: whether the scores are rates in [0, 1], so that few of them, or equal ones, get an exact bound
            (`_bounded`): a sample without spread has none under resampling either, and 0 of 96 is not surely 0.
            Others are cross-entropies: few of them get Student's interval, as far as it is not negative.
        seed: seed of the resampling; the same input gives the same interval.
        resamples: number of resampled means.

    Raises:
        ValueError: no values, values that are not finite, or `clusters` of another length.
    """
    if clusters is not None:
        values = list(cluster_means(values, clusters).values())
    array = _checked(values)
    interval = _bounded(array) if rate else _student(array) if len(array) < FEW else None
    low, high = interval or _percentiles(array, _resampled_means(array, seed, resamples))
    return Estimate(float(array.mean()), low, high, len(array))


def grade_mean(grades: ArrayLike) -> Estimate:
    """Mean grade over diffs with its interval; `grades` [N] lie in [LOW, HIGH], one per diff.

    Rescaled to [0, 1]: few grades, or equal ones, get a bound that holds for every variable between 0 and 1.

    Raises:
        ValueError: no grades, or one outside the scale.
    """
    array = _checked(grades)
    if array.min() < LOW or array.max() > HIGH:
        raise ValueError(f"grades must lie between {LOW:g} and {HIGH:g}")
    scaled = bootstrap_mean((array - LOW) / GRADES)
    interval = (LOW + GRADES * scaled.low, LOW + GRADES * scaled.high)
    return Estimate(float(array.mean()), *interval, scaled.n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of one false difference or more in the family stays below them."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def paired_difference(
    a: Mapping[Hashable, float],
    b: Mapping[Hashable, float],
    *,
    span: float,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedDifference:
    """Mean difference a - b over the diffs that both have, with its bootstrap interval and a randomisation test.

    Resampling whole diffs keeps the pairing: a topic that is hard for both methods does not widen
    the interval of their difference. p is two-sided: how often the mean is as far from zero when each difference
    has either sign, as it would have if the methods were alike; over all signs where they are few, else over drawn
    ones. It holds for any n; resampled means would call four differences of one sign among sixty significant.

    Args:
        a: score of each diff under one method.
        b: score of each diff under the other.
        span: the largest difference that two scores can have, for the interval of few or equal differences.
        seed: seed of the resampling.
        resamples: number of resampled means, and of drawn signs.

    Raises:
        ValueError: no diff is in both.
    """
    both = [diff for diff in a if diff in b]
    array = _checked([a[diff] - b[diff] for diff in both])
    bounded = _bounded(np.clip((array + span) / (2 * span), 0, 1))
    low, high = (
        _percentiles(array, _resampled_means(array, seed, resamples))
        if bounded is None
        else (2 * span * edge - span for edge in bounded)
    )
    p_value = _randomisation_p(array, seed, resamples)
    return PairedDifference(float(array.mean()), low, high, len(array), p_value)


def _randomisation_p(differences: NDArray[np.float64], seed: int, resamples: int) -> float:
    from scipy.stats import monte_carlo_test, permutation_test

    changed = differences[differences != 0]
    if len(changed) < 2:
        return 1.0

    def size(values: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.abs(values.sum(axis)).round(9)  # rounding errors must not tell equal sums apart

    rng = np.random.default_rng(seed)
    options = {"vectorized": True, "alternative": "greater", "n_resamples": resamples}
    options["batch"] = max(1, _CHUNK // len(changed))
    if 2 ** len(changed) <= resamples:  # all signs
        found = permutation_test((changed,), size, permutation_type="samples", **options)
    else:  # drawn ones, at a tenth of the time that `permutation_test` takes

        def flipped(size: tuple[int, int]) -> NDArray[np.float64]:
            return changed * (rng.integers(2, size=size) * 2.0 - 1)

        found = monte_carlo_test(changed, flipped, size, **options)
    return float(found.pvalue)
