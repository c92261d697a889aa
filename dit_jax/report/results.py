"""Answers of a run as CSV files in the paper's columns, for spreadsheets, other programs and the tables.

`results.csv` has one row per answer about a held-out diff; `results-graded.csv` one per answer and grader,
with `score` from 1 to 5, empty where a grader gave none (then `reason` says why). Spreadsheets compute none of their
cells: see `outgoing.csv_text`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dit_jax.runtime.outgoing import csv_text

RESULTS_FILE, GRADED_FILE = "results.csv", "results-graded.csv"
_ADDED = (
    "trigger", "variant", "topic_category", "method", "kind", "diff", "question", "wording_seen", "answer",
)  # fmt: skip


def _rows(answers: Iterable[Mapping[str, Any]], subject: str) -> list[dict[str, Any]]:
    return [
        {
            subject: answer["topic"],
            f"guessed_{subject}": answer["guess"],
            **{name: answer.get(name) for name in _ADDED},
        }
        for answer in answers
    ]


def results_csv(answers: Iterable[Mapping[str, Any]], subject: str = "topic") -> str:
    """The text of `results.csv`."""
    return csv_text(_rows(answers, subject), (subject, f"guessed_{subject}", *_ADDED))


def graded_csv(
    answers: Sequence[Mapping[str, Any]], grades: Iterable[Sequence[Any]], subject: str = "topic"
) -> str:
    """The text of `results-graded.csv`.

    Args:
        answers: rows of answers.jsonl.
        grades: per grading (a grader, or one of its repeats) one grade for each answer, in their order; a
            grade has `score` (1–5 or None), `grader` and `reason`.
        subject: from `subject_of`.
    """
    rows = []
    for grading in grades:
        for row, grade in zip(_rows(answers, subject), grading, strict=True):
            score = "" if grade.score is None else f"{grade.score:.4g}"
            row.update(score=score, grader=grade.grader, reason=grade.reason)
            rows.append(row)
    columns = (subject, f"guessed_{subject}", "score", *_ADDED, "grader", "reason")
    return csv_text(rows, columns)
