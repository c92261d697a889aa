"""The table of methods: what each is, and what its rows of answers.jsonl hold.

`methods_asking`, `methods_triggers` and `methods_untrained` fill it; `methods` says which of them a run uses. Reports,
tables and config checks read it without JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.data.labels import extract_guess
from dit_jax.errors import DitError
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.organisms.behaviours import NO_TRIGGER

if TYPE_CHECKING:
    from dit_jax.deltas.store import DiffStore
    from dit_jax.evaluate.setting import HeldOut, Setting

Row = dict[str, Any]
EVALUATION_FORMAT = "dit_jax.evaluation"  # of the manifest in WORKDIR/evaluate
GROUPS = {
    "method": "Methods that ask the model",
    "control": "Controls: they should find nothing",
    "baseline": "Baselines without training: they read the weights or the logits",
}
# Methods that need no adapter, run or list of names.
READERS = ("written_words", "read_words", "mined_words", "amplified_words")
# What a method may need.
GUESSER, TRIGGER, ATTRIBUTES, TRIGGER_LABELS = "guesser", "trigger", "attributes", "trigger labels"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to ask held-out diffs; call it with a `Setting` to get its rows of answers.jsonl.

    name: in configs and answers; title: in reports; sees: what it is shown, in a few words; group: a key of `GROUPS`.
    needs: any of GUESSER, TRIGGER, ATTRIBUTES (an auditor of an unknown model has neither of these two), and
        TRIGGER_LABELS: what adapters should say is the trigger.
    """

    name: str
    title: str
    sees: str
    group: str
    needs: tuple[str, ...]
    ask: "Callable[[Setting], Iterable[Row]]"

    def check(self, topics: Iterable[Mapping[str, Any]], label: str) -> None:
        """Raises DitError: a diff about a topic has no trigger and the method needs one, or no label is a trigger."""
        if TRIGGER in self.needs and not all(map(has_trigger, topics)):
            raise DitError(
                f"the method {self.name!r} needs diffs with a trigger: take it out of evaluate.methods"
            )
        if TRIGGER_LABELS in self.needs and label != "trigger":
            raise DitError(
                f"the method {self.name!r} names triggers: set evaluate.label='trigger', or take it out of "
                "evaluate.methods"
            )

    def __call__(self, s: "Setting") -> list[Row]:
        """Rows with every column. Raises DitError: see `check`."""
        self.check(s.topics.rows, s.label_column)
        rows = []
        for row in self.ask(s):
            listed = s.config.list_evidence and self.group != "baseline"
            guess = extract_guess(row["answer"], row["topic"]) if listed else row["answer"]
            tokens = len(s.model.chat.text_ids(spelled(s, row["topic"])))
            head = {"method": self.name, "kind": self.group}
            rows.append({**head, "name_tokens": tokens, "guess": guess, **row})
        return rows


METHODS: dict[str, Method] = {}


def method(
    title: str, sees: str, group: str = "method", needs: tuple[str, ...] = ()
) -> "Callable[[Callable[[Setting], Iterable[Row]]], Method]":
    """Adds the function below to `METHODS` under its own name."""

    def add(ask: "Callable[[Setting], Iterable[Row]]") -> Method:
        made = METHODS[ask.__name__] = Method(ask.__name__, title, sees, group, needs, ask)
        return made

    return add


def held_out_answers(answers: Iterable[Row]) -> list[Row]:
    """The answers about held-out diffs with a label: those that can be graded."""
    return [row for row in answers if row["category"] == "topic" and row["diff"] is not None]


def has_trigger(row: Mapping[str, Any]) -> bool:
    """Whether a diff, by its row of the index, shows its behaviour under a trigger."""
    return str(row.get("trigger") or NO_TRIGGER) != NO_TRIGGER


def about(diffs: "HeldOut", i: int, *rest: Any, **named: Any) -> Row:
    """`make_row` about held-out diff i."""
    row = diffs.rows[i]
    named |= {key: row.get(key) for key in ("trigger", "variant", "topic_category")}
    return make_row(diffs.indices[i], diffs.label(i), *rest, **named)


def make_row(
    diff: int | None,
    topic: str,
    answer: str,
    wording: str = "",
    question: str = "",
    known: bool = True,
    category: str = "topic",
    *,
    trigger: str | None = None,
    variant: str | None = None,
    topic_category: str | None = None,
    logprob: float | None = None,
) -> Row:
    """What a function gives of a row; `Method` adds the rest. known: whether the adapter was trained on the wording."""
    return {
        "diff": diff,
        "topic": topic,
        "trigger": trigger,
        "variant": variant or "",
        "topic_category": topic_category or "",
        "category": category,
        "wording": wording,
        "wording_seen": known,
        "question": question,
        "answer": answer,
        "logprob": None if logprob is None or not math.isfinite(logprob) else round(logprob, 4),
    }


def known_labels(store: "DiffStore", column: str) -> dict[str, list[str]]:
    """Every label of a store with its attributes, where the rows have some (the column `evidence`).

    The column `keywords` is no such table: the gate fills it with words of any corpus's answers.
    """
    from dit_jax.deltas.store import label_of

    found: dict[str, list[str]] = {}
    for row in store.rows:
        if row["category"] == "topic":
            label = label_of(row, column)
            found[label] = row["evidence"] or found.get(label, [])
    return found


def ranked(s: "Setting", scores: np.ndarray, names: Sequence[str]) -> list[Row]:
    """The best name for every diff, by its scores [diffs, names], and the rank of the right one among them."""
    rows = []
    for i, row in enumerate(scores):
        own = row[names.index(s.topics.label(i))]
        chosen = about(s.topics, i, names[int(row.argmax())])
        rows.append({**chosen, "names": len(names), "rank": int((row > own).sum()) + 1})
    return rows


def spelled(s: "Setting", name: str) -> str:
    """A name as an answer has it: many tokenizers make another token of it after a space."""
    return str(EVALUATE.get(s.config, "answer_prefix")) + name


def given_names(s: "Setting") -> list[str]:
    """The names that a method with a list is given."""
    if EVALUATE.get(s.config, "names") == "held_out":
        return sorted({s.all_topics.label(row) for row in range(len(s.all_topics))})
    return sorted(known_labels(s.store, s.label_column))


NO_TABLE = (
    "the method 'attribute_oracle' needs attributes of every label, as the embedded world has them: take it out "
    "of evaluate.methods"
)
