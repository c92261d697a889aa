"""How well two columns of grades agree: quadratic weighted kappa and Spearman's rank correlation."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVELS = 5


def to_levels(scores: ArrayLike) -> NDArray[np.int64]:
    """Scores as whole grades 1..5, halves rounded up."""
    rounded = np.floor(np.asarray(scores, np.float64) + 0.5)
    return np.clip(rounded, 1, LEVELS).astype(np.int64)


def quadratic_kappa(a: ArrayLike, b: ArrayLike) -> float:
    """Cohen's kappa of grades 1..5 with squared distances as weights (Cohen 1968).

    1 is perfect agreement, 0 what the two columns' distributions give by chance. Scores are rounded
    to whole grades first. NaN for no grades at all; 1 where every
    grade of both columns is the same one.

    Raises:
        ValueError: the lengths differ.
    """
    left, right = to_levels(a), to_levels(b)
    if left.shape != right.shape:
        raise ValueError(f"{left.shape} and {right.shape} grades cannot be compared")
    if not left.size:
        return float("nan")
    observed = np.mean((left - right) ** 2)
    counts_left = np.bincount(left, minlength=LEVELS + 1)[1:] / left.size
    counts_right = np.bincount(right, minlength=LEVELS + 1)[1:] / right.size
    grid = np.arange(LEVELS)
    expected = counts_left @ ((grid[:, None] - grid) ** 2) @ counts_right
    if expected == 0:
        return 1.0
    return float(1 - observed / expected)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks [n] with ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where a column does not vary."""
    left, right = (_ranks(np.asarray(x, np.float64)) for x in (a, b))
    if len(left) < 2 or left.std() == 0 or right.std() == 0:
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])
