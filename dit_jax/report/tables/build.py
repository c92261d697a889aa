"""The numbers of the tables: means, distributions, paired tests, judge noise and what was left out."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from dit_jax.data.labels import exact_match
from dit_jax.report.statistics import (
    GRADES,
    Estimate,
    PairedDifference,
    grade_mean,
    holm,
    paired_difference,
)
from dit_jax.report.tables.graded import Graded, Unit
from dit_jax.report.tables.paper import PRINTED, TABLES, Place, method_of, places

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of a table: the number in print (if any) and the rebuilt one (if there is a file for it)."""

    place: Place
    printed: float | None
    graded: Graded | None
    estimate: Estimate | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Paired difference `first - second` over the diffs that both have; p adjusted within its group."""

    group: str
    first: str
    second: str
    difference: PairedDifference
    adjusted: float


@dataclasses.dataclass(frozen=True)
class JudgeNoise:
    """How far a grader agrees with itself: pairs of label and answer that it graded more than once.

    Answers that are the label itself are left out: there is nothing to judge in them.

    pairs: how many such pairs; grades: of them in all; agree: the chance that two grades of a pair are the
    same; sd: standard deviation of one grade.
    """

    grader: str
    pairs: int
    grades: int
    agree: float
    sd: float


def distribution(graded: Graded) -> tuple[int, int, int, int, int]:
    """How many grades are 1, 2, 3, 4, 5; grades between are rounded, halves up."""
    counts = Counter(math.floor(row.score + 0.5) for row in graded.rows)
    return (counts[1], counts[2], counts[3], counts[4], counts[5])


def estimate(graded: Graded) -> Estimate | None:
    """Mean over diffs with its interval; None without grades."""
    return grade_mean(list(graded.by_unit().values())) if graded.rows else None


def cells(graded: Sequence[Graded]) -> list[Cell]:
    """All cells that are printed, rebuilt or both, by table; files that claim one cell get columns of their own."""
    found: dict[Place, Graded] = {}
    for item in graded:
        for place in places(item):
            other = found.get(place)
            if other is not None and other is not item:
                place = place._replace(column=f"{place.column} · {item.experiment} · {item.name}")
            found[place] = item
    filled = {
        place: Cell(place, PRINTED.get(place), item, estimate(item))
        for place, item in found.items()
    }
    empty = {place: Cell(place, value, None, None) for place, value in PRINTED.items()}
    return sorted((empty | filled).values(), key=lambda cell: list(TABLES).index(cell.place.table))


def disagreements(table: Sequence[Cell]) -> list[Cell]:
    """Rebuilt cells that differ from the number in print in the second decimal."""
    return [
        cell
        for cell in table
        if cell.printed is not None
        and cell.estimate is not None
        and abs(cell.estimate.mean - cell.printed) > 0.005 + 1e-9
    ]


_Scores = Callable[[Graded], dict[Unit, float]]


@dataclasses.dataclass(frozen=True)
class _Family:
    """A reference and what it is tested against, all named; one family shares one correction of p."""

    title: str
    reference: tuple[str, Graded]
    others: list[tuple[str, Graded]]
    scores: _Scores


def comparisons(graded: Sequence[Graded]) -> list[Comparison]:
    """Paired tests: DIT against every other method on the same diffs; numbers of diffs; ranks."""
    found = []
    for family in [*_methods(graded), *_sizes(graded, "scaling"), *_sizes(graded, "rank")]:
        name, reference = family.reference
        ours = family.scores(reference)
        pairs = []
        for other_name, item in family.others:
            theirs = family.scores(item)
            if any(unit in theirs for unit in ours):
                pairs.append((other_name, paired_difference(ours, theirs, span=GRADES)))
        adjusted = holm([difference.p_value for _, difference in pairs])
        found += [
            Comparison(family.title, name, other_name, difference, p_value)
            for (other_name, difference), p_value in zip(pairs, adjusted, strict=True)
        ]
    return found


def _methods(graded: Sequence[Graded]) -> list[_Family]:
    """In each folder or run: DIT against the known methods and, in a run of ours, the controls."""
    families = []
    for (experiment, grader), members in by(graded, lambda x: (x.experiment, x.grader)).items():
        named = [(method_of(item), item) for item in members if item.rows]
        dit = next((pair for pair in named if pair[0] == "dit"), None)
        if dit is not None:
            others = [pair for pair in named if pair[1] is not dit[1] and pair[0]]
            title = f"{experiment}, {grader}" if grader else experiment
            families.append(_Family(title, dit, others, Graded.by_unit))
    return families


def _sizes(graded: Sequence[Graded], table: str) -> list[_Family]:
    """Files of the paper: every number of diffs against the largest, every rank against rank 1.

    Other ranks are other diffs of the same topics, so they are paired by topic.
    """
    families = []
    placed = [
        (place, item)
        for item in graded
        for place in places(item)
        if place.table == table and item.rows and not item.own
    ]
    for column, members in by(placed, lambda pair: pair[0].column).items():
        rows = {place.row: item for place, item in members}
        if table == "rank":
            first, title = "1", f"{column}, ranks, paired by topic"
            names = {row: f"rank {row}" if row.isdigit() else row for row in rows}
            scores: _Scores = Graded.by_label
        else:
            first, title = max(rows, key=int), f"{column}, numbers of training diffs"
            names = {row: f"{row} diffs" for row in rows}
            scores = Graded.by_unit
        if first in rows:
            order = sorted(rows, key=row_order)
            others = [(names[row], rows[row]) for row in order if row != first]
            families.append(_Family(title, (names[first], rows[first]), others, scores))
    return families


def row_order(row: str) -> tuple[int, str]:
    """Numbers by size, then names."""
    return (int(row), "") if row.isdigit() else (10**9, row)


def by(items: Sequence[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items in groups by a key, both in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def judge_noise(graded: Sequence[Graded]) -> list[JudgeNoise]:
    """Noise of every grader that graded some pair of label and answer twice or more, in any file.

    Runs of ours are left out: they grade a pair once, however many answers are the same, and their reports say how
    far repeats agree.
    """
    scores: dict[str, dict[tuple[str, str], list[float]]] = {}
    for item in (item for item in graded if not item.own):
        pairs = scores.setdefault(item.grader, {})
        for row in item.rows:
            if exact_match(row.guess, row.label):
                continue
            pairs.setdefault((row.label, row.guess), []).append(row.score)
    found = []
    for grader, pairs in scores.items():
        repeated = [values for values in pairs.values() if len(values) > 1]
        if not repeated:
            continue
        grades = sum(map(len, repeated))
        agree = [
            sum(n * (n - 1) for n in Counter(values).values()) / (len(values) * (len(values) - 1))
            for values in repeated
        ]
        squares = sum(
            sum((value - sum(values) / len(values)) ** 2 for value in values) for values in repeated
        )
        sd = math.sqrt(squares / (grades - len(repeated)))
        found.append(JudgeNoise(grader, len(repeated), grades, sum(agree) / len(agree), sd))
    return found
