"""The Inspect scorer: grades from 1 to 5 by our graders, and exact match."""

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState

from dit_jax.errors import DitError, printable
from dit_jax.inspection.one_line import checked

if TYPE_CHECKING:
    from dit_jax.graders import Grade, Grader

METRICS = [mean(), stderr()]


@scorer(metrics={"*": METRICS})
@checked("scorer argument -S")
def graded(graders: str | Sequence[str] = ("normalised", "calibrated"), judge: str = "") -> Scorer:
    """Grades what an answer names (after the last colon that is not the label's) against the label.

    Args:
        graders: names of offline graders (docs/grading.md).
        judge: an API model as Inspect writes it ("openai/gpt-4o-mini"), which gives another grade.

    A score has a number for each grader, for `judge`, and `exact_match` (0 or 1). A missing grade is NaN, which
    Inspect's metrics leave out; the explanation says why.
    """
    from dit_jax.graders import check_grader

    names = [name.strip() for name in _split(graders)]
    for name in names:
        check_grader(name)
    if judge:
        check_grader("inspect", model=judge)
    made: dict[str, Grader] = {}

    async def score(state: TaskState, target: Target) -> Score:
        from dit_jax.data.labels import exact_match, extract_guess
        from dit_jax.graders import Item, get_grader

        for name in names:
            made.setdefault(name, get_grader(name))
        if judge:
            made.setdefault("judge", get_grader("inspect", model=judge))
        guess = extract_guess(state.output.completion, target.text)
        item = Item(target.text, guess, state.input_text)
        values: dict[str, Any] = {"exact_match": float(exact_match(guess, target.text))}
        reasons = []
        for name, grader in made.items():
            grade = await _grade(grader, item)
            values[name] = math.nan if grade.score is None else grade.score
            if grade.reason:
                reasons.append(f"{name}: {grade.reason}")
        explanation = "; ".join([f"label: {target.text}", *reasons])
        return Score(value=values, answer=guess, explanation=printable(explanation))

    return score


def _split(graders: str | Sequence[str]) -> Sequence[str]:
    parts = graders.split(",") if isinstance(graders, str) else graders
    if not parts:
        raise DitError("the scorer 'graded' has no graders: name at least one, e.g. normalised")
    return parts


async def _grade(grader: "Grader", item: Any) -> "Grade":
    ask = getattr(grader, "grade_async", None)
    if ask is not None:  # it waits for a network
        (grade,) = await ask([item])
    else:
        (grade,) = await asyncio.to_thread(grader, [item])
    return grade
