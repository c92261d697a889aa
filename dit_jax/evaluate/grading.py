"""Grades of a run's answers: by the graders that the config names, kept on disk, as file, numbers and section."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.artifacts import write_text
from dit_jax.evaluate.document import (
    Column,
    Distribution,
    Grade,
    Named,
    Prose,
    Section,
    Table,
    TableRow,
)
from dit_jax.evaluate.names import METHODS, Json, shown_name
from dit_jax.evaluate.results import GRADED_FILE, graded_csv, held_out_answers
from dit_jax.evaluate.tables import build
from dit_jax.evaluate.tables.graded import Graded, read_file

DEFAULT_GRADERS = ("normalised",)  # works everywhere, and says no more than exact match does
CACHE_FILE = "grades.jsonl"


@dataclasses.dataclass(frozen=True)
class RunGrades:
    """The grades of a run by method and grader, and how far repeats of a grader agree."""

    graded: list[Graded]
    agreement: dict[str, Json]


def grade_run(
    rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], subject: str, workdir: Path
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
    items = [(row["topic"], row["guess"], row.get("question") or "") for row in asked]
    cache = Cache(workdir / CACHE_FILE)
    options = settings.get("grader_options", {})
    gradings, agreement = [], {}
    for name in settings.get("graders", DEFAULT_GRADERS):
        grader = get_grader(name, **dict(options.get(name, {})))
        made = grade(grader, items, int(settings.get("grade_repeats", 1)), cache)
        gradings += [[grades[i] for grades in made.grades] for i in range(made.repeats)]
        if (repeats := made.agreement()) is not None:
            agreement[made.grader] = dataclasses.asdict(repeats)
    path = workdir / "report" / GRADED_FILE
    write_text(path, graded_csv(asked, gradings, subject))
    return RunGrades(read_file(path, GRADED_FILE) if asked and gradings else [], agreement)


def summarise_grades(grades: RunGrades) -> Json:
    """By grader and method: mean, interval, n, counts of the grades 1–5 and of what was left out."""
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


def _rank(item: Graded) -> int:
    """The order of a report: a method's unseen wordings after its seen ones."""
    name = item.name.removesuffix("_unseen")
    return 2 * (list(METHODS).index(name) if name in METHODS else len(METHODS)) + (
        name != item.name
    )


def grades_section(grades: RunGrades) -> Section | None:
    """Mean grades and distributions of every method, by grader; None without grades."""
    if not grades.graded:
        return None
    groups = []
    for grader, members in build.by(grades.graded, lambda item: item.grader).items():
        rows = []
        for item in sorted(members, key=_rank):
            estimate, missing = build.estimate(item), sum(item.excluded.values())
            gaps = "; ".join(f"{count} × {reason}" for reason, count in item.excluded.items())
            name = Named(method_name(item.name), f"left out: {gaps}" if missing else "")
            if estimate is None:
                rows.append(TableRow([name, "–", "no grades", "0"]))
                continue
            mean = Grade(estimate.mean, estimate.low, estimate.high)
            counts = Distribution(build.distribution(item))
            rows.append(TableRow([name, mean, counts, str(estimate.n)], strong=item.name == "dit"))
        groups.append((f"Grader: {grader}", rows))
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
    return Section("grades", "Grades", [Prose(text), Table(columns, groups)])
