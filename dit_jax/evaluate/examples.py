"""Examples of answers: some right, some wrong, and a sheet of all held-out diffs."""

import math

from dit_jax.evaluate import metrics
from dit_jax.evaluate.document import Block, Example, Examples, Prose, Quote, Section, Sheet
from dit_jax.evaluate.names import Json, ordered_methods, shown_name
from dit_jax.evaluate.summary import Inputs, Row, seen

_MOST_EXAMPLES = 6  # of the right and of the wrong, each


def _confidence(row: Row) -> str:
    logprob = row.get("logprob")
    if not isinstance(logprob, int | float) or not math.isfinite(logprob):
        return ""
    number = f"−{-logprob:.2f}" if logprob <= -0.005 else "0.00"
    return f"log-probability {number}"


def _right(row: Row) -> bool:
    return metrics.exact_match(row["guess"], row["topic"])


def _spread(rows: list[Row], most: int) -> list[Row]:
    """At most `most` of the rows, evenly spaced: a choice that looks at nothing but the order."""
    step = max(1.0, len(rows) / most)
    return [rows[int(index * step)] for index in range(min(most, len(rows)))]


def _first_answers(inputs: Inputs) -> dict[str, dict[int, Row]]:
    """The first seen-wording answer of every method to every held-out diff."""
    answers: dict[str, dict[int, Row]] = {}
    for row in inputs.rows:
        if row["category"] == "topic" and row["diff"] is not None and seen(row):
            answers.setdefault(row["method"], {}).setdefault(row["diff"], row)
    return answers


def _quote(row: Row | None) -> Quote:
    return Quote("–") if row is None else Quote(row["guess"] or "(empty)", _right(row))


def examples_section(summary: Json, inputs: Inputs) -> Section:
    answers = _first_answers(inputs)
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
        )

    blocks: list[Block] = [
        Prose(
            "One answer for each held-out diff, evenly spaced among the right and the wrong ones, "
            "not picked by hand. Beside it is what the other methods guessed about the same diff."
        )
    ]
    for right, title in ((False, "Wrong"), (True, "Right")):
        rows = [row for row in asked if _right(row) is right]
        if rows:
            shown = _spread(rows, _MOST_EXAMPLES)
            heading = f"{title} ({len(shown)} of {len(rows)})"
            blocks.append(Examples(heading, [example(row) for row in shown]))
    sheet = [
        (row["topic"], _right(row), [_quote(answers[n].get(row["diff"])) for n in names])
        for row in asked
    ]
    if sheet:
        title = f"All {len(sheet)} held-out diffs, every method's guess"
        blocks.append(Sheet(title, [shown_name(name) for name in names], sheet))
    return Section("examples", "Examples", blocks)
