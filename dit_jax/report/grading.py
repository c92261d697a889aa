"""Grades of a run's answers: by the graders that the config names, kept on disk, as file, numbers and section."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.methods import METHODS, held_out_answers
from dit_jax.report import plots
from dit_jax.report.document import (
    Block,
    Column,
    Distribution,
    Figure,
    Grade,
    Named,
    Prose,
    Section,
    Table,
    TableRow,
)
from dit_jax.report.results import GRADED_FILE, graded_csv
from dit_jax.report.statistics import GRADES
from dit_jax.report.summary import paired_with_dit
from dit_jax.report.tables import build
from dit_jax.report.tables.graded import Graded, read_file
from dit_jax.report.wording import Json, grader_title, p_text, shown_name, signed
from dit_jax.runtime.artifacts import write_text

CACHE_FILE = "grades.jsonl"


@dataclasses.dataclass(frozen=True)
class RunGrades:
    """The grades of a run by method and grader, and how far repeats of a grader agree.

    scores: by grader, one for each of `results.held_out_answers` in their order, None for a gap.
    """

    graded: list[Graded]
    agreement: dict[str, Json]
    scores: dict[str, list[float | None]] = dataclasses.field(default_factory=dict)


def grade_run(
    rows: Sequence[dict[str, Any]], settings: Mapping[str, Any], subject: str, workdir: Path
) -> RunGrades:
    """Grades the answers about held-out diffs and writes WORKDIR/report/results-graded.csv.

    Args:
        rows: of answers.jsonl.
        settings: the `evaluate` section of the config: `graders` (names of `dit_jax.graders`),
            `grader_options` (a section of keyword arguments by grader) and `grade_repeats`.
        subject: from `results.subject_of`.

    Raises:
        DitError: a grader that is unknown or cannot work here.
    """
    from dit_jax.graders import Cache, get_grader, grade

    asked = held_out_answers(rows)
    items = [
        (row["topic"], None if row.get("gap") else row["guess"], row.get("question") or "")
        for row in asked
    ]
    cache = Cache(workdir / CACHE_FILE)
    options = EVALUATE.get(settings, "grader_options")
    gradings, agreement, scores = [], {}, {}
    for name in EVALUATE.get(settings, "graders"):
        grader = get_grader(name, **dict(options.get(name, {})))
        made = grade(grader, items, int(EVALUATE.get(settings, "grade_repeats")), cache)
        grades = [
            [_with_reason(grade, row) for grade in repeats]
            for row, repeats in zip(asked, made.grades, strict=True)
        ]
        gradings += [[repeats[i] for repeats in grades] for i in range(made.repeats)]
        scores[made.grader] = made.scores()
        if (repeats := made.agreement()) is not None and repeats.n:  # none: no item has two grades
            agreement[made.grader] = dataclasses.asdict(repeats)
    path = workdir / "report" / GRADED_FILE
    write_text(path, graded_csv(asked, gradings, subject))
    return RunGrades(read_file(path, GRADED_FILE) if asked and gradings else [], agreement, scores)


def _with_reason(made: Any, row: Mapping[str, Any]) -> Any:
    """A gap of the method (a guesser without a reply) says so in place of the grader."""
    return dataclasses.replace(made, reason=row["gap"]) if row.get("gap") else made


def summarise_grades(grades: RunGrades) -> Json:
    """By grader: for each method the mean, its interval, n, counts of the grades 1–5 and of what was left out;

    the paired differences from DIT; the agreement of repeats, where there are any.
    """
    summary: Json = {}
    for item in grades.graded:
        estimate = build.estimate(item)
        numbers: Json = {"counts": list(build.distribution(item)), "excluded": dict(item.excluded)}
        if estimate is not None:
            numbers |= {
                "mean": estimate.mean,
                "ci_low": estimate.low,
                "ci_high": estimate.high,
                "n": estimate.n,
            }
        summary.setdefault(item.grader, {"methods": {}})["methods"][item.name] = numbers
    for grader, members in build.by(grades.graded, lambda item: item.grader).items():
        means = {item.name: item.by_unit() for item in members if item.rows}
        summary[grader]["differences_from_dit"] = (
            paired_with_dit(means, GRADES) if "dit" in means else {}
        )
    for grader, repeats in grades.agreement.items():
        summary.setdefault(grader, {"methods": {}})["repeats"] = repeats
    return summary


def method_name(method: str) -> str:
    """The shown name of a method; answers to wordings that were not trained on are one of their own."""
    if method.endswith("_unseen"):
        return f"{shown_name(method.removesuffix('_unseen'))}, unseen wordings"
    return shown_name(method)


def as_code(text: str) -> str:
    """A name that is not ours inside prose: as code, in which nothing is markup."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _order(method: str) -> int:
    """The order of a report: a method's unseen wordings after its seen ones."""
    name = method.removesuffix("_unseen")
    return 2 * (list(METHODS).index(name) if name in METHODS else len(METHODS)) + (name != method)


def grades_section(grades: RunGrades, summary: Json) -> Section | None:
    """Mean grades and distributions of every method, by grader, and paired tests; None without grades.

    Args:
        summary: of `summarise_grades`.
    """
    if not grades.graded:
        return None
    groups, tests, figures = [], [], []
    for grader, members in build.by(grades.graded, lambda item: item.grader).items():
        rows, bars = [], []
        for item in sorted(members, key=lambda item: _order(item.name)):
            estimate, missing = build.estimate(item), sum(item.excluded.values())
            gaps = "; ".join(f"{count} × {reason}" for reason, count in item.excluded.items())
            name = Named(method_name(item.name), f"left out: {gaps}" if missing else "")
            if estimate is None:
                rows.append(TableRow([name, "–", "no grades", "0"]))
                continue
            mean = Grade(estimate.mean, estimate.low, estimate.high)
            counts = Distribution(build.distribution(item))
            rows.append(TableRow([name, mean, counts, str(estimate.n)], strong=item.name == "dit"))
            bars.append((name.name, counts.counts, estimate.mean))
        title = grader_title(grader)
        groups.append((title, rows))
        if compared := _difference_rows(summary[grader]["differences_from_dit"]):
            tests.append((title, compared))
        if bars:
            figures.append(
                Figure(
                    f"grades_{len(groups)}",
                    title,
                    f"Divided bars: the grades 1 to 5 of every method by {grader}",
                    lambda bars=bars: plots.grade_distributions(bars),  # type: ignore[misc]
                    markdown_only=True,
                )
            )
    text = (
        "How close each guess comes to the label, from 1 (unrelated) to 5 (the label), by the grader named above "
        "the rows. An answer without a grade is a gap and counts nowhere. The bar divides the grades into 1 (left, "
        "faint) to 5 (right, full colour). All grades are in `results-graded.csv`."
    )
    for grader, repeats in grades.agreement.items():
        text += (
            f" {as_code(grader)} graded everything more than once: the same grade in "
            f"{100 * repeats['same']:.1f} % of the pairs, quadratic weighted kappa "
            f"{repeats['kappa']:.2f}, standard deviation {repeats['spread']:.2f}."
        )
    columns = [Column("Method"), Column("Mean grade"), Column("Grades 1 to 5"), Column("n", True)]
    blocks: list[Block] = [Prose(text), Table(columns, groups), *figures]
    if tests:
        titles = ("Grades", "95 % interval", "p", "p, Holm", "n")
        heads = [Column("DIT compared with"), *(Column(title, True) for title in titles)]
        blocks.append(
            Prose(
                "Mean grade of DIT minus that of each other method, on the same diffs ("
                "p of a two-sided randomisation test, and adjusted by Holm's method over the methods)."
            )
        )
        blocks.append(Table(heads, tests))
    return Section("grades", "Grades", blocks)


def _difference_rows(differences: Json) -> list[TableRow]:
    names = sorted(differences, key=_order)
    return [
        TableRow(
            [
                method_name(name),
                signed(differences[name]["difference"]),
                f"{signed(differences[name]['ci_low'])} to {signed(differences[name]['ci_high'])}",
                p_text(differences[name]["p_value"]),
                p_text(differences[name]["p_holm"]),
                str(differences[name]["n"]),
            ]
        )
        for name in names
    ]
