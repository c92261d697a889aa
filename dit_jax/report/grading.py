"""Grades of a run's answers: by the graders that the config names, kept on disk, and reduced to numbers."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax import graders
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.method_table import held_out_answers
from dit_jax.report.graded import Graded, GradedRow
from dit_jax.report.inputs import Json, Row, seen, variant, variants
from dit_jax.report.statistics import GRADES
from dit_jax.report.summary import interval, paired_with_dit
from dit_jax.report.wording import UNSEEN

CACHE_FILE = "grades.jsonl"


@dataclasses.dataclass(frozen=True)
class RunGrades:
    """The grades of a run, and how far repeats of a grader agree.

    asked: the answers that were graded. gradings: for each grader and repeat one grade of each of them. scores: by
    grader, one for each of them, None for a gap.
    """

    asked: list[Row]
    gradings: list[list[graders.Grade]]
    agreement: dict[str, Json]
    scores: dict[str, list[float | None]]

    def by_grader(self, wanted: str | None = None) -> dict[str, list[Graded]]:
        """The grades of every method on diffs of one variant, the first by default, by grader.

        A gap counts nowhere but among what is excluded.
        """
        wanted = variants(self.asked)[0] if wanted is None else wanted
        found: dict[str, dict[str, tuple[list[GradedRow], Counter[str]]]] = {}
        for grading in self.gradings:
            for row, made in zip(self.asked, grading, strict=True):
                if variant(row) != wanted:
                    continue
                name = row["method"] if seen(row) else row["method"] + UNSEEN
                rows, gaps = found.setdefault(made.grader, {}).setdefault(name, ([], Counter()))
                if made.score is None:
                    gaps[made.reason[:80] or "no grade"] += 1
                else:
                    rows.append(GradedRow(row["diff"], row["topic"], row["guess"], made.score))
        return {
            grader: [
                Graded("", name, "", "", tuple(rows), dict(gaps), grader, own=True)
                for name, (rows, gaps) in methods.items()
            ]
            for grader, methods in found.items()
        }


def grade_run(rows: list[Row], settings: Mapping[str, Any], workdir: Path) -> RunGrades:
    """Grades the answers about held-out diffs; grades that cost something are kept in WORKDIR.

    Args:
        rows: of answers.jsonl.
        settings: the `evaluate` section of the config: `graders` (names of `dit_jax.graders`),
            `grader_options` (a section of keyword arguments by grader) and `grade_repeats`.

    Raises:
        DitError: a grader that is unknown or cannot work here.
    """
    asked = held_out_answers(rows)
    items = [
        (row["topic"], None if row.get("gap") else row["guess"], row.get("question") or "")
        for row in asked
    ]
    cache = graders.Cache(workdir / CACHE_FILE)
    options = EVALUATE.get(settings, "grader_options")
    made = RunGrades(asked, [], {}, {})
    for name in EVALUATE.get(settings, "graders"):
        grader = graders.get_grader(name, **dict(options.get(name, {})))
        graded = graders.grade(grader, items, int(EVALUATE.get(settings, "grade_repeats")), cache)
        for repeat in range(graded.repeats):
            grades = [
                _with_reason(row[repeat], a) for row, a in zip(graded.grades, asked, strict=True)
            ]
            made.gradings.append(grades)
        made.scores[graded.grader] = graded.scores()
        repeats = graded.agreement()
        if repeats is not None and repeats.n:  # none: no item has two grades
            made.agreement[graded.grader] = dataclasses.asdict(repeats)
    return made


def _with_reason(made: graders.Grade, row: Row) -> graders.Grade:
    """A gap of the method (a guesser without a reply) says so in place of the grader."""
    return dataclasses.replace(made, reason=row["gap"]) if row.get("gap") else made


def summarise_grades(grades: RunGrades) -> Json:
    """By grader: for each method the mean, its interval, n, counts of the grades 1–5 and of what was left out;

    the paired differences from DIT; the agreement of repeats, where there are any. Where topics have several diffs,
    that is about the first variant; `by_variant` has the mean grades of each.
    """
    summary: Json = {}
    kinds = variants(grades.asked)
    for grader, members in grades.by_grader().items():
        entry: Json = {"methods": {}}
        for item in members:
            estimate = item.estimate()
            entry["methods"][item.name] = {
                "counts": list(item.distribution()),
                "excluded": dict(item.excluded),
                **(interval(estimate) if estimate else {}),
            }
        means = {item.name: item.by_unit() for item in members if item.rows}
        entry["differences_from_dit"] = paired_with_dit(means, GRADES) if "dit" in means else {}
        if grader in grades.agreement:
            entry["repeats"] = grades.agreement[grader]
        if len(kinds) > 1:
            own = {kind: grades.by_grader(kind)[grader] for kind in kinds}
            entry["by_variant"] = {
                kind: {item.name: interval(mean) for item in items if (mean := item.estimate())}
                for kind, items in own.items()
            }
        summary[grader] = entry
    return summary
