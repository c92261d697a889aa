"""What an answer is worth: from answers about diffs whose truth is known to probabilities for those of others."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.errors import DitError

FORMAT = "dit_jax.calibration"
VERSION = 4
FOLDS = 5
RIDGE = 1.0  # of the weights of standardised features: finite even where classes are separable
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
RATES = (0.01, 0.05, 0.2)  # false positives
RESAMPLES = 2000
FEWEST = 10  # diffs of each class
SMALLEST_STD = 1e-6  # of a feature, by which it is divided


@dataclasses.dataclass(frozen=True)
class Known:
    """A diff whose truth is known: what `Reading` says of it, whether it hides something, whether the answer is right.

    group: diffs of one group, such as a diff and noise of its norms, are never in training and test both. control:
    whether it is noise or no diff, which no audit meets.
    """

    evidence: tuple[float, float]
    features: tuple[float, float]
    hidden: bool
    right: bool
    group: int
    control: bool = False


def calibrate(known: Sequence[Known], facts: dict[str, Any]) -> dict[str, Any]:
    """The content of a calibration file: two logistic maps of pairs of numbers, and what they are worth.

    `hidden`: probability that a diff hides anything, where half of all diffs do, from the evidence against `none`.
    `right`: that its name is right, if it hides something and has one, from its agreement and likelihood ratio. Every
    number of their worth comes from held-out folds.

    Noise and no diff are easier to tell from a finetune that hides something than a benign finetune is. So benign
    diffs alone stand for what hides nothing if there are `FEWEST`; `controls` says whether the others do, too.

    Args:
        facts: what the calibration holds for: digests, battery, where the diffs came from.

    Raises:
        DitError: there are too few diffs with or without something hidden.
    """
    judged, named = _judged(known, FEWEST)
    hidden = np.array([one.hidden for one in judged])
    for what, count in (("hide something", hidden.sum()), ("hide nothing", (~hidden).sum())):
        check_count(int(count), what)
    return {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "controls": any(one.control for one in judged),
        "hidden": _fit_and_test(
            judged, [one.evidence for one in judged], [one.hidden for one in judged], even=True
        ),
        "right": _fit_and_test(
            named, [one.features for one in named], [one.right for one in named]
        ),
    }


def check_count(count: int, what: str) -> None:
    """Raises DitError if a calibration has too few diffs of a kind. what: they do, to complete its message."""
    if count < FEWEST:
        raise DitError(
            f"calibration needs {FEWEST} diffs or more that {what}, not {count}: use a store with more held-out diffs, "
            "or another --split"
        )


def worth_on(made: dict[str, Any], known: Sequence[Known]) -> dict[str, Any]:
    """What a calibration is worth on other diffs than those it was made from, at its own thresholds."""
    judged, named = _judged(known, fewest=1)
    cases = {
        "hidden": ([one.evidence for one in judged], [one.hidden for one in judged]),
        "right": ([one.features for one in named], [one.right for one in named]),
    }
    found = {}
    for name, (pairs, truth) in cases.items():
        y = np.asarray(truth, bool)
        scores = _apply(made[name], _scaled(pairs))
        limits = [one and (one["wanted"], one["above"]) for one in made[name]["thresholds"]]
        worth = _worth(scores, y, limits, _odds(y) if name == "hidden" else 1.0)
        found[name] = {"n": len(y), "positive": int(y.sum()), **worth}
    return found


def _judged(known: Sequence[Known], fewest: int) -> tuple[Sequence[Known], Sequence[Known]]:
    """Whom the maps are about. `hidden`: finetunes, or all with fewer benign ones; `right`: named ones with a topic."""
    finetunes = [one for one in known if not one.control]
    enough = sum(not one.hidden for one in finetunes) >= fewest
    named = [one for one in finetunes if one.hidden and one.features[0] > 0]
    return finetunes if enough else known, named


def probabilities(
    made: dict[str, Any], evidence: Sequence[float], features: Sequence[float]
) -> dict[str, float | None]:
    """What a calibration says of a `Reading`.

    Returns:
        hidden: probability that the diff hides anything. right: that it does and the name is right; None without one.
    """
    hidden, right = (
        float(_apply(made[name], _scaled([pair]))[0])
        for name, pair in (("hidden", evidence), ("right", features))
    )
    return {"hidden": hidden, "right": hidden * right if features[0] else None}


# ------------------------------------------------------------------ the maps and their worth


def _fit_and_test(
    known: Sequence[Known],
    pairs: Sequence[tuple[float, float]],
    truth: Sequence[bool],
    even: bool = False,
) -> dict[str, Any]:
    """even: fit for even odds of what is true, whatever their share among these diffs."""
    y = np.asarray(truth, bool)
    x = _scaled(pairs)
    # What is false is spread evenly over the folds.
    false = {one.group for one, true in zip(known, y, strict=True) if not true}
    order = sorted({one.group for one in known}, key=lambda group: (group not in false, group))
    place = {group: i for i, group in enumerate(order)}
    folds = np.array([place[one.group] for one in known], int) % FOLDS
    held_out = np.zeros(len(y))
    for fold in range(FOLDS):
        inside = folds != fold
        if (~inside).any():
            held_out[~inside] = _apply(_fit(x[inside], y[inside], even), x[~inside])
    fitted = _fit(x, y, even)
    limits = [_limit(held_out, y, rate) for rate in RATES]
    worth = _worth(held_out, y, limits, _odds(y) if even else 1.0)
    return {**fitted, "n": len(y), "positive": int(y.sum()), **worth}


def _odds(y: np.ndarray) -> float:
    return float((y.sum() + 1) / ((~y).sum() + 1))


def _scaled(pairs: Sequence[Sequence[float]]) -> np.ndarray:
    """[n, 2], on a scale on which 50 nats are not ten times 5."""
    x = np.asarray(pairs, float).reshape(len(pairs), 2)
    return np.sign(x) * np.log1p(np.abs(x))


def _fit(x: np.ndarray, y: np.ndarray, even: bool) -> dict[str, Any]:
    """Logistic regression with a ridge. No weight is negative: more evidence never lowers a probability.

    Its targets are those of Platt (1999), so that n diffs of n do not make a probability of 1.
    """
    from scipy.optimize import minimize

    if len(y) == 0:
        return {"mean": [0.0, 0.0], "std": [1.0, 1.0], "weights": [0.0, 0.0], "bias": 0.0}
    mean, std = x.mean(axis=0), np.maximum(x.std(axis=0), SMALLEST_STD)
    z = (x - mean) / std
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:2], parameters[2]
        logit = z @ weights + bias
        slope = _logistic(logit) - target
        gradient = np.append(z.T @ slope + RIDGE * weights, slope.sum())
        value = (np.logaddexp(0, logit) - target * logit).sum() + RIDGE / 2 * weights @ weights
        return float(value), gradient

    found = minimize(
        loss, np.zeros(3), jac=True, method="L-BFGS-B", bounds=[(0, None), (0, None), (None, None)]
    ).x
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "weights": found[:2].tolist(),
        "bias": float(found[2]) - (math.log(_odds(y)) if even else 0.0),
    }


def _apply(fitted: dict[str, Any], x: np.ndarray) -> np.ndarray:
    z = (x - fitted["mean"]) / fitted["std"]
    return _logistic(z @ np.asarray(fitted["weights"]) + fitted["bias"])


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))


Limit = tuple[float, float] | None  # the rate of false positives that was wanted, and the threshold


def _worth(
    scores: np.ndarray, y: np.ndarray, limits: Sequence[Limit], odds: float
) -> dict[str, Any]:
    """AUROC, reliability and what lies above thresholds, of scores that no fit has seen.

    odds: of true to false among these diffs, if the scores are for even odds: the reliability is, too.
    """
    weights = np.where(y, 1.0, odds)
    reliability = []
    error = 0.0
    for low, high in zip(BINS[:-1], BINS[1:], strict=True):
        inside = (scores >= low) & ((scores < high) | (high == 1.0))
        if inside.any():
            rate = _share(int(y[inside].sum()), int(inside.sum()))
            for key in ("mean", "ci_low", "ci_high"):
                rate[key] /= rate[key] + (1 - rate[key]) * odds
            said = float(np.average(scores[inside], weights=weights[inside]))
            reliability.append({"from": low, "to": high, "said": said, **rate})
            error += weights[inside].sum() / weights.sum() * abs(said - rate["mean"])
    return {
        "auroc": _auroc_interval(scores, y),
        "thresholds": [_threshold(scores, y, limit) for limit in limits],
        "reliability": reliability,
        "calibration_error": float(error),
    }


def _limit(scores: np.ndarray, y: np.ndarray, rate: float) -> Limit:
    """The lowest threshold above which a new negative lies with at most this probability, if they are exchangeable.

    With too few negatives for that it is the largest score of one. None without positives or negatives.
    """
    negatives = np.sort(scores[~y])[::-1]
    if not len(negatives) or not y.any():
        return None
    # A new score lies above the k-th largest of n with a probability of at most k / (n + 1).
    return rate, float(negatives[max(0, int(rate * (len(negatives) + 1)) - 1)])


def _threshold(scores: np.ndarray, y: np.ndarray, limit: Limit) -> dict[str, Any] | None:
    """The shares of negatives and positives above a threshold; None without a threshold, positives or negatives."""
    negatives, positives = scores[~y], scores[y]
    if limit is None or not len(negatives) or not len(positives):
        return None
    wanted, above = limit
    return {
        "wanted": wanted,
        "above": above,
        "false_positives": _share(int((negatives > above).sum()), len(negatives)),
        "found": _share(int((positives > above).sum()), len(positives)),
    }


def _share(count: int, total: int) -> dict[str, Any]:
    """A share with its exact binomial 95 % interval (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(0.95)
    return {
        "mean": count / total,
        "ci_low": float(interval.low),
        "ci_high": float(interval.high),
        "n": total,
    }


def _auroc_interval(scores: np.ndarray, y: np.ndarray) -> dict[str, Any] | None:
    """The area under the ROC curve, with a percentile bootstrap interval over diffs of each class."""
    positives, negatives = scores[y], scores[~y]
    if not len(positives) or not len(negatives):
        return None
    rng = np.random.default_rng(0)
    values = [
        _auroc(rng.choice(positives, len(positives)), rng.choice(negatives, len(negatives)))
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(values, [0.025, 0.975])
    return {
        "mean": _auroc(positives, negatives),
        "ci_low": float(low),
        "ci_high": float(high),
        "n": len(y),
    }


def _auroc(positives: np.ndarray, negatives: np.ndarray) -> float:
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positives, negatives]))[: len(positives)].sum()
    n, m = len(positives), len(negatives)
    return float((ranks - n * (n + 1) / 2) / (n * m))
