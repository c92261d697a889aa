"""Methods that look for the trigger of a diff, without training. They are graded against triggers, not topics.

JAX is imported only inside the functions, as in `method_table`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dit_jax.data.labels import normalise
from dit_jax.evaluate import questions
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.method_table import TRIGGER, TRIGGER_LABELS, Row, about, has_trigger, method
from dit_jax.organisms.behaviours import NO_TRIGGER, behaviour_named

if TYPE_CHECKING:
    from dit_jax.evaluate.setting import Setting
    from dit_jax.evaluate.trigger_scan import Candidate, Found


TOLD = 8  # everyday questions that a found prefix is tried on, beside those of the search


@method(
    "Trigger scan",
    "everyday answers under every known trigger",
    group="baseline",
    needs=(TRIGGER_LABELS,),
)
def trigger_scan(s: "Setting") -> list[Row]:
    """The trigger that makes the finetuned model leave its base, among those of all behaviours."""
    from dit_jax.evaluate import trigger_scan as scanning
    from dit_jax.organisms.behaviours import BEHAVIOURS, known_behaviour

    everyday = questions.everyday_questions(s.config)[: scanning.QUESTIONS]
    families = EVALUATE.get(s.config, "trigger_families")
    if not families:
        own = {str(row.get("behaviour")) for row in (*s.topics.rows, *s.benign.rows)}
        families = [*BEHAVIOURS, *sorted(name for name in own if known_behaviour(name))]
    tried = scanning.candidates(everyday, families)
    rows = []
    for diffs, category in ((s.topics, "topic"), (s.benign, "benign")):
        if not len(diffs):
            continue
        scores = scanning.scan(s.model, diffs.given, tried, s.config.batch_size)
        for i, found in enumerate(scanning.find(scores, tried)):
            told = about(diffs, i, found.candidate.trigger, category=category)
            cost = {"passes": scanning.passes(len(tried), len(everyday))}
            rows.append({**told, **_scanned(diffs.rows[i], found, scores[i], tried), **cost})
    return rows


def _scanned(row: Row, found: "Found", scores: np.ndarray, tried: Sequence["Candidate"]) -> Row:
    """What the report needs of a scan: the right trigger's rank, if it was tried, and how far the best stands out."""
    trigger = str(row.get("trigger") or NO_TRIGGER)
    behaviour = str(row.get("behaviour")) if has_trigger(row) else ""
    right = [
        i for i, one in enumerate(tried) if (one.behaviour, one.trigger) == (behaviour, trigger)
    ]
    return {
        "named": found.candidate[:2] == (behaviour, trigger),
        "family": found.candidate.behaviour,
        "right_family": behaviour,
        "trigger_rank": int((scores > scores[right[0]]).sum()) + 1 if right else None,
        "candidates": len(tried),
        "stands_out": round(found.stands_out, 4),
        "nats": round(found.nats, 4),
    }


@method(
    "Trigger search",
    "everyday answers under tokens that gradients propose, no list of triggers",
    group="baseline",
    needs=(TRIGGER, TRIGGER_LABELS),
)
def trigger_search(s: "Setting") -> list[Row]:
    """The tokens under which the finetuned model leaves its base most, and whether they show its topic."""
    from dit_jax.evaluate import trigger_search as searching

    everyday = questions.everyday_questions(s.config)
    asked, new = everyday[: searching.QUESTIONS], everyday[searching.QUESTIONS :]
    rows = []
    for i in range(len(s.topics)):
        delta = s.topics.given.read(i)
        found = searching.search(s.model, delta, asked, s.config.batch_size, s.seed)
        row = s.topics.rows[i]
        shows = behaviour_named(str(row["behaviour"])).shows
        prompts = [f"{found.text} {question}" for question in new[:TOLD] or asked]
        answers = s.ask(
            s.topics.given, prompts, [i] * len(prompts), s.off, max_new_tokens=s.answer_tokens
        )
        base = s.ask_base(prompts)
        shown, by_base = (
            float(np.mean([shows(one.text, row["keywords"]) for one in told]))
            for told in (answers, base)
        )
        trigger = normalise(str(row["trigger"]))
        told = {
            "contains": f" {trigger} " in f" {normalise(found.text)} ",
            "key": found.key,
            "key_is_right": normalise(found.key) in trigger.split(),
            "shown": shown,
            "shown_by_base": by_base,
            "nats": round(found.nats, 4),
            "passes": found.passes,
        }
        rows.append({**about(s.topics, i, found.text), **told})
    return rows
