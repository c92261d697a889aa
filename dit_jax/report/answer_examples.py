"""Examples of answers: some right, some wrong, and all of them to browse."""

import math
from collections.abc import Iterable

from dit_jax.data import labels
from dit_jax.evaluate.methods import held_out_answers
from dit_jax.report.document import (
    Block,
    Browser,
    Entry,
    Example,
    Examples,
    Prose,
    Quote,
    Section,
    Transcript,
)
from dit_jax.report.grading import RunGrades, method_name
from dit_jax.report.summary import Inputs, Row, seen
from dit_jax.report.wording import Json, ordered_methods, shown_name

_MOST_EXAMPLES = 6  # of the right and of the wrong, each
_MOST_ENTRIES = 3000  # on the page; all answers are in results.csv
_MOST_CHARS = 600  # of an answer there
_MOST_TRANSCRIPTS = 2  # of each method
_Grades = dict[int, list[str]]  # by id of a row


def _confidence(row: Row) -> str:
    logprob = row.get("logprob")
    if not isinstance(logprob, int | float) or not math.isfinite(logprob):
        return ""
    number = f"−{-logprob:.2f}" if logprob <= -0.005 else "0.00"
    return f"log-probability {number}"


def _right(row: Row) -> bool:
    return labels.exact_match(row["guess"], row["topic"])


def _spread(rows: list[Row], most: int) -> list[Row]:
    """At most `most` of the rows, evenly spaced: a choice that looks at nothing but the order."""
    step = max(1.0, len(rows) / most)
    return [rows[int(index * step)] for index in range(min(most, len(rows)))]


def _first_answers(rows: Iterable[Row], wanted: bool) -> dict[str, dict[int, Row]]:
    """The first answer of every method to every held-out diff, in seen (or unseen) wordings."""
    answers: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["category"] == "topic" and row["diff"] is not None and seen(row) is wanted:
            answers.setdefault(row["method"], {}).setdefault(row["diff"], row)
    return answers


def _quote(row: Row | None) -> Quote:
    return Quote("–") if row is None else Quote(row["guess"] or "(empty)", _right(row))


def _grades(inputs: Inputs, grades: RunGrades) -> _Grades:
    found: _Grades = {}
    for grader, scores in grades.scores.items():
        for row, score in zip(held_out_answers(inputs.rows), scores, strict=True):
            text = "no grade" if score is None else f"{score:.3g}"
            found.setdefault(id(row), []).append(f"{grader} {text}")
    return found


def _browser(summary: Json, inputs: Inputs, graded: _Grades) -> Browser:
    """The first answer of every method, and the first of DIT in a new wording, diff by diff."""
    known, new = (_first_answers(inputs.answered, wanted) for wanted in (True, False))
    columns = [
        (method_name(name), known[name])
        for name in ordered_methods(summary["methods"])
        if name in known
    ]
    columns += [(method_name(f"{name}_unseen"), rows) for name, rows in new.items()]
    diffs = list(dict.fromkeys(diff for _, rows in columns for diff in rows))
    shown = diffs[: max(1, _MOST_ENTRIES // len(columns))]
    entries = []
    for diff in shown:
        for method, rows in columns:
            if row := rows.get(diff):
                entries.append(
                    Entry(
                        topic=row["topic"],
                        method=method,
                        question=str(row.get("question") or ""),
                        answer=row["answer"][:_MOST_CHARS] or "(empty)",
                        guess=row["guess"][:_MOST_CHARS],
                        right=_right(row),
                        grades=graded.get(id(row), []),
                    )
                )
    title = f"All {len(diffs)} held-out diffs with a label"
    if len(shown) < len(diffs):
        title = f"{len(shown)} of {len(diffs)} held-out diffs with a label (all are in results.csv)"
    return Browser(f"{title}, {len(entries)} first answers", [name for name, _ in columns], entries)


def _transcripts(inputs: Inputs) -> list[Block]:
    """A few of what each guesser read, evenly spaced."""
    by_method: dict[str, list[Row]] = {}
    for row in inputs.transcripts:
        by_method.setdefault(row["method"], []).append(row)
    blocks: list[Block] = []
    for method, rows in by_method.items():
        for row in _spread(rows, _MOST_TRANSCRIPTS):
            guess = Quote(row["guess"] or "(empty)", _right(row))
            exchanges = [(q, a[:_MOST_CHARS] or "(empty)") for q, a in row["exchanges"]]
            title = f"What the guesser read, {shown_name(method)}"
            blocks.append(Transcript(title, row["topic"], guess, exchanges))
    return blocks


def examples_section(summary: Json, inputs: Inputs, grades: RunGrades) -> Section:
    answers = _first_answers(inputs.answered, True)
    graded = _grades(inputs, grades)
    names = [name for name in ordered_methods(summary["methods"]) if name in answers]
    others = [name for name in names if name != "dit"]
    asked = list(answers.get("dit", {}).values())

    def example(row: Row) -> Example:
        return Example(
            topic=row["topic"],
            question=str(row.get("question") or row.get("wording") or ""),
            answer=row["answer"] or "(empty)",
            guess=row["guess"],
            right=_right(row),
            confidence=_confidence(row),
            others=[(shown_name(n), _quote(answers[n].get(row["diff"]))) for n in others],
            grades=graded.get(id(row), []),
        )

    blocks: list[Block] = [
        Prose(
            f"DIT's first answers about some of the held-out diffs: at most {_MOST_EXAMPLES} wrong and "
            f"{_MOST_EXAMPLES} right ones, evenly spaced and not picked by hand. Beside each is what the other "
            "methods guessed about the same diff. Below them is the first answer of every method about every "
            "held-out diff; the answers in all wordings are in `results.csv`."
        )
    ]
    for right, title in ((False, "Wrong"), (True, "Right")):
        rows = [row for row in asked if _right(row) is right]
        if rows:
            shown = _spread(rows, _MOST_EXAMPLES)
            heading = f"{title} ({len(shown)} of {len(rows)})"
            blocks.append(Examples(heading, [example(row) for row in shown]))
    blocks.append(_browser(summary, inputs, graded))
    blocks += _transcripts(inputs)
    return Section("examples", "Examples", blocks)
