"""What every grader is: items in, grades on the 1–5 scale out; repeats, gaps, agreement.

Scale: 5 the answer names the label, 4 nearly, 3 a related thing or a too broad one, 2 loosely
related, 1 unrelated. A grade that could not be had is a gap (score None, with a reason), never a 1.
"""

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit_jax.errors import DitError
from dit_jax.graders.cache import Cache, entry_key

LOW, HIGH = 1.0, 5.0
LEVELS = 5


class Item(NamedTuple):
    """One answer to grade: the true label, the answer (None: there is none), the question asked."""

    label: str
    answer: str | None
    question: str = ""


@dataclass(frozen=True)
class Grade:
    """A grade by the grader of that name.

    score: 1 to 5, or None for a gap; raw: what the score was read from (a judge's words, a
    similarity); reason: why there is a gap, empty if there is none.
    """

    score: float | None
    raw: str
    grader: str
    reason: str = ""


class Grader:
    """A grader: call it with items. The defaults are those of a function of label and answer.

    name: in configs and reports; an instance may add its model. about: what it is, in reports. needs: what it cannot
    do without, beyond this package. version: raised when its grades change. settings: everything else that its grades
    depend on (prompt, model, calibration), as text; it is part of the cache key. deterministic: asking again gives the
    same grade. cached: worth keeping on disk. batch: how many items one call should get.
    """

    name: str
    about: str
    needs = ""
    version = "1"
    settings = ""
    deterministic = True
    cached = False
    batch = 4096

    @classmethod
    def check(cls, **options: Any) -> None:
        """Raises DitError for what can be seen to be missing before there are answers: a package, a key."""

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        """One grade per item, in order. `repeat` numbers independent gradings of the same items."""
        raise NotImplementedError


def check_options(
    what: str, make: Callable[..., Any], *args: Any, hint: str = "", **options: Any
) -> None:
    """Raises DitError, "<what>: …<hint>", if `make` does not take these arguments."""
    try:
        inspect.signature(make).bind(*args, **options)
    except TypeError as error:
        raise DitError(f"{what}: {error}{hint}") from None


def with_options(
    what: str, make: Callable[..., Any], *args: Any, hint: str = "", **options: Any
) -> Any:
    """make(*args, **options). Raises DitError: see `check_options`."""
    check_options(what, make, *args, hint=hint, **options)
    return make(*args, **options)


def to_scale(similarity: float) -> float:
    """A similarity in [0, 1] stretched over the scale; not calibrated to what a judge would say."""
    return LOW + (HIGH - LOW) * min(1.0, max(0.0, similarity))


# ------------------------------------------------------------------ grading


@dataclass(frozen=True)
class Graded:
    """Grades of a batch of items.

    grades[item][repeat]; grader: its name; repeats: how many were made (1 where asking again would
    change nothing); from_cache: how many grades were read from disk; gaps: reasons with their counts;
    distinct: the first of equal items; damaged: what is wrong with lines of the cache whose grades were made again.
    """

    grades: list[list[Grade]]
    grader: str
    repeats: int
    from_cache: int
    gaps: dict[str, int]
    distinct: tuple[int, ...]
    damaged: tuple[str, ...] = ()

    def scores(self) -> list[float | None]:
        """One score per item: the mean over its repeats that have one, None if none has."""
        found = [[made.score for made in row if made.score is not None] for row in self.grades]
        return [float(np.mean(scores)) if scores else None for scores in found]

    def agreement(self) -> "Agreement | None":
        """How much repeats agree, equal items being graded once; None with a single repeat."""
        if self.repeats == 1:
            return None
        return repeat_agreement([self.grades[i] for i in self.distinct])


def grade(
    grader: Grader,
    items: Sequence[Item | tuple[Any, ...]],
    repeats: int = 1,
    cache: Cache | None = None,
) -> Graded:
    """Grades items, each distinct item once per repeat, with grades on disk reused.

    Args:
        grader: from `dit_jax.graders.get_grader`.
        items: `Item`s, or tuples (label, answer) or (label, answer, question). An answer of None is
            a gap.
        repeats: independent gradings of every item; a deterministic grader makes one.
        cache: where grades are kept; only graders that ask for it use it. Gaps are never kept, so
            that a later call tries them again.

    Raises:
        ValueError: repeats < 1.
        DitError: from the grader, when it cannot work at all (no model, no key).
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}: at least one is needed")
    rows = [Item(*item) for item in items]
    repeats = 1 if grader.deterministic else repeats
    cache = cache if grader.cached else None
    found: dict[tuple[Item, int], Grade] = {}
    from_cache = 0
    for repeat in range(repeats):
        keys: dict[Item, str] = {}
        missing: list[Item] = []
        for item in dict.fromkeys(rows):
            if item.answer is None:
                found[item, repeat] = Grade(None, "", grader.name, "no answer")
                continue
            keys[item] = entry_key(grader.name, grader.version, grader.settings, *item, repeat)
            entry = cache.get(keys[item]) if cache is not None else None
            if entry is None:
                missing.append(item)
            else:
                found[item, repeat] = Grade(entry.score, entry.raw, grader.name)
                from_cache += 1
        for start in range(0, len(missing), grader.batch):
            batch = missing[start : start + grader.batch]
            for item, made in zip(batch, grader(batch, repeat), strict=True):
                found[item, repeat] = made
                if cache is not None and made.score is not None:
                    cache.put(keys[item], made.score, made.raw, grader.name)
    grades = [[found[row, repeat] for repeat in range(repeats)] for row in rows]
    gaps = Counter(made.reason for row in grades for made in row if made.score is None)
    damaged = tuple(cache.damaged) if cache is not None else ()
    distinct = tuple({item: i for i, item in reversed(list(enumerate(rows)))}.values())
    return Graded(grades, grader.name, repeats, from_cache, dict(gaps), distinct, damaged)


# ------------------------------------------------------------------ agreement


@dataclass(frozen=True)
class Agreement:
    """Agreement of repeated gradings of the same items (judge noise).

    same: share of pairs of repeats with one score; kappa: quadratic weighted, mean over pairs of
    repeats; spread: mean standard deviation within an item; n: items with two scores or more.
    """

    same: float
    kappa: float
    spread: float
    n: int


def repeat_agreement(grades: Sequence[Sequence[Grade]]) -> Agreement:
    """Agreement between the repeats of grades[item][repeat]; gaps are left out.

    With no item that has two scores everything is NaN and n is 0.
    """
    spreads: list[float] = []
    pairs: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in grades:
        scores = [(k, made.score) for k, made in enumerate(row) if made.score is not None]
        if len(scores) > 1:
            spreads.append(float(np.std([score for _, score in scores], ddof=1)))
        for (i, first), (j, second) in itertools.combinations(scores, 2):
            pairs.setdefault((i, j), []).append((first, second))
    if not spreads:
        return Agreement(float("nan"), float("nan"), float("nan"), 0)
    same = [first == second for columns in pairs.values() for first, second in columns]
    kappas = [quadratic_kappa(*zip(*columns, strict=True)) for columns in pairs.values()]
    means = [float(np.mean(values)) for values in (same, kappas, spreads)]
    return Agreement(means[0], means[1], means[2], len(spreads))


def to_levels(scores: ArrayLike) -> NDArray[np.int64]:
    """Scores as whole grades 1..5, halves rounded up."""
    rounded = np.floor(np.asarray(scores, np.float64) + 0.5)
    return np.clip(rounded, 1, LEVELS).astype(np.int64)


def quadratic_kappa(a: ArrayLike, b: ArrayLike) -> float:
    """Cohen's kappa of grades 1..5 with squared distances as weights (Cohen 1968).

    Own code: of the libraries that reports need, none has it. 1 is perfect agreement, 0 what the two columns'
    distributions give by chance. Scores are rounded to whole grades first. NaN for no grades at all; 1 where every
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
    expected = np.mean(left**2) - 2 * left.mean() * right.mean() + np.mean(right**2)
    return 1.0 if expected == 0 else float(1 - observed / expected)
