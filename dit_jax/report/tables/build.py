"""The numbers of the tables: cells, paired tests and judge noise."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

from dit_jax.data.labels import exact_match
from dit_jax.report.graded import Graded, Unit
from dit_jax.report.statistics import (
    GRADES,
    Estimate,
    PairedDifference,
    holm,
    paired_difference,
)
from dit_jax.report.tables.paper import PRINTED, TABLES, Place, method_of, places

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Cell(NamedTuple):
    """A cell of a table: the number in print (if any) and the rebuilt one (if there is a file for it)."""

    place: Place
    printed: float | None
    graded: Graded | None = None
    estimate: Estimate | None = None

    @property
    def differs(self) -> bool:
        """Whether both numbers are there and differ in the second decimal."""
        if self.printed is None or self.estimate is None:
            return False
        return abs(self.estimate.mean - self.printed) > 0.005 + 1e-9


class Comparison(NamedTuple):
    """Paired difference `first - second` over the diffs that both have; p adjusted within its group."""

    group: str
    first: str
    second: str
    difference: PairedDifference
    adjusted: float


class JudgeNoise(NamedTuple):
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


def cells(graded: Sequence[Graded]) -> list[Cell]:
    """All cells that are printed, rebuilt or both, by table; files that claim one cell get columns of their own."""
    found: dict[Place, Graded] = {}
    for item in graded:
        for place in places(item):
            other = found.get(place)
            if other is not None and other is not item:
                place = place._replace(column=f"{place.column} · {item.experiment} · {item.name}")
            found[place] = item
    table = {place: Cell(place, value) for place, value in PRINTED.items()}
    for place, item in found.items():
        table[place] = Cell(place, PRINTED.get(place), item, item.estimate())
    return sorted(table.values(), key=lambda cell: list(TABLES).index(cell.place.table))


# ------------------------------------------------------------------ paired tests


class _Family(NamedTuple):
    """A reference and what it is tested against, all named; one family shares one correction of p."""

    title: str
    reference: tuple[str, Graded]
    others: list[tuple[str, Graded]]
    scores: Callable[[Graded], dict[Unit, float]] = Graded.by_unit


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
            families.append(_Family(title, dit, others))
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
        ranks = table == "rank"
        first = "1" if ranks else max(rows, key=int)
        if first not in rows:
            continue
        name = "rank {}" if ranks else "{} diffs"
        named = {
            row: (name.format(row) if row.isdigit() else row, rows[row])
            for row in sorted(rows, key=row_order)
        }
        reference = named.pop(first)
        title = "ranks, paired by topic" if ranks else "numbers of training diffs"
        scores = Graded.by_label if ranks else Graded.by_unit
        families.append(_Family(f"{column}, {title}", reference, list(named.values()), scores))
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


# ------------------------------------------------------------------ judge noise


def judge_noise(graded: Sequence[Graded]) -> list[JudgeNoise]:
    """Noise of every grader that graded some pair of label and answer twice or more, in any file.

    Runs of ours are left out: they grade a pair once, however many answers are the same, and their reports say how
    far repeats agree.
    """
    scores: dict[str, dict[tuple[str, str], list[float]]] = {}
    for item in graded:
        for row in item.rows:
            if not item.own and not exact_match(row.guess, row.label):
                pairs = scores.setdefault(item.grader, {})
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
        means = [sum(values) / len(values) for values in repeated]
        squares = sum(
            (value - mean) ** 2
            for values, mean in zip(repeated, means, strict=True)
            for value in values
        )
        sd = math.sqrt(squares / (grades - len(repeated)))
        found.append(JudgeNoise(grader, len(repeated), grades, sum(agree) / len(agree), sd))
    return found
