"""Graded answers about one set of diffs, by one method and one grader: what reports and tables compute with."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from dit_jax.report import plots
from dit_jax.report.statistics import Estimate, cluster_means, grade_mean

Unit = Hashable  # what counts as one draw of chance: a diff


class GradedRow(NamedTuple):
    """One answer with its grade. unit: the diff that it is about."""

    unit: Unit
    label: str
    guess: str
    score: float


@dataclasses.dataclass(frozen=True)
class Graded:
    """All grades of one method on one set of diffs.

    experiment: folder of a file of the paper, or name of a run. name: file without suffix, or method.
    subject: "topic" or "summary", what the answers name. own: whether it comes from a run of ours, whose
    config is `config`. excluded: how many rows were left out, by reason. folder: what the run's workdir lies in;
    series: its name if several of the runs lie there (a sweep, whose runs are one curve), else the run's.
    """

    experiment: str
    name: str
    file: str
    subject: str
    rows: tuple[GradedRow, ...]
    excluded: Mapping[str, int]
    grader: str = ""
    own: bool = False
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: str = ""
    series: str = ""

    def by_unit(self) -> dict[Unit, float]:
        """Mean grade of each diff."""
        return cluster_means([row.score for row in self.rows], [row.unit for row in self.rows])

    def by_label(self) -> dict[Unit, float]:
        """Mean grade of each label, to pair diffs of different folders that hide the same topic."""
        return cluster_means([row.score for row in self.rows], [row.label for row in self.rows])

    def estimate(self) -> Estimate | None:
        """Mean over diffs with its interval; None without grades."""
        return grade_mean(list(self.by_unit().values())) if self.rows else None

    def distribution(self) -> tuple[int, int, int, int, int]:
        """How many grades are 1, 2, 3, 4, 5; grades between are rounded, halves up."""
        counts = Counter(math.floor(row.score + 0.5) for row in self.rows)
        return (counts[1], counts[2], counts[3], counts[4], counts[5])


class Group(NamedTuple):
    """A titled part of a table of grades; its rows have name, note, estimate, counts and whether they are strong."""

    title: str
    rows: list[dict[str, Any]]

    def plot(self, name: str, alt: str) -> list[plots.Plot]:
        """The distributions as divided bars; none without grades. `alt`: whose grades they are."""
        bars = [(x["name"], x["counts"], x["estimate"].mean) for x in self.rows if x["estimate"]]
        text = f"Divided bars: the grades 1 to 5 of every method {alt}"
        draw = functools.partial(plots.grade_distributions, bars)
        return [plots.Plot(name, self.title, text, draw)] if bars else []


def grade_group(title: str, members: Sequence[tuple[str, str, Graded]]) -> Group:
    """A group of (name, note, grades)."""
    return Group(
        title,
        [
            {
                "name": name,
                "note": note,
                "estimate": item.estimate(),
                "counts": item.distribution(),
                "strong": item.name == "dit",
            }
            for name, note, item in members
        ],
    )
