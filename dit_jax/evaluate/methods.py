"""Which methods a run uses: the whole table, the checks of a config and the choice of `evaluate.methods`."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from dit_jax.config.user_code import import_object
from dit_jax.errors import DitError, did_you_mean
from dit_jax.evaluate import methods_asking, methods_triggers, methods_untrained
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.method_table import (
    ATTRIBUTES,
    GUESSER,
    METHODS,
    NO_TABLE,
    TRIGGER,
    TRIGGER_LABELS,
    Method,
    Row,
    about,
    has_trigger,
    known_labels,
)

if TYPE_CHECKING:
    from dit_jax.api import Model
    from dit_jax.deltas.store import DiffStore
    from dit_jax.evaluate.setting import Setting
    from dit_jax.models.delta_trees import Delta

# They fill the table, in this order.
__all__ = [
    "METHODS",
    "check_methods",
    "chosen_methods",
    "find_method",
    "import_reader",
    "methods_asking",
    "methods_triggers",
    "methods_untrained",
]


def check_methods(config: Mapping[str, Any]) -> None:
    """Raises DitError for methods that the stage `evaluate` would refuse, as far as the whole config tells."""
    named = EVALUATE.get(config.get("evaluate", {}), "methods")
    chosen = list(map(find_method, named))
    source = config.get("data", {}).get("source", "tiny_world")
    if source != "tiny_world" and any(ATTRIBUTES in one.needs for one in chosen):
        raise DitError(NO_TABLE)


def find_method(name: str) -> Method:
    """The method of that name, or the user's own reader at an import path `package.module:function`.

    A reader is a function (base, diff, question) -> answer: a `Model`, a delta tree on the host, a text -> a text.

    Raises:
        DitError: an unknown name, or an import path without a function.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        known = f": choose from {', '.join(METHODS)}, or the import path 'package.module:function' of your own"
        hint = did_you_mean(name, METHODS, known)
        raise DitError(f"config key 'evaluate.methods': unknown method {name!r}{hint}")
    read = import_reader(name)

    def ask(s: "Setting") -> list[Row]:
        """Topics and benign diffs, all with the first question."""
        question, rows = s.seen[0], []
        for diffs, category in ((s.topics, "topic"), (s.benign, "benign")):
            for i in range(len(diffs)):
                answer = read(s.model, diffs.given.read(i), question)
                rows.append(about(diffs, i, answer, question, question, category=category))
        return rows

    return Method(name, name, "a function of base, diff and question", "method", (), ask)


def import_reader(path: str) -> "Callable[[Model, Delta, str], str]":
    """The reader at an import path, which then raises a DitError for an answer that is no text."""
    found = import_object(path, "reader")
    if not callable(found):
        raise DitError(f"reader {path!r} is a {type(found).__name__}, not a function")

    def read(base: "Model", diff: "Delta", question: str) -> str:
        answer = found(base, diff, question)
        if not isinstance(answer, str):
            raise DitError(f"reader {path!r} gave a {type(answer).__name__}, not a text")
        return answer

    return read


def chosen_methods(config: Mapping[str, Any], store: "DiffStore") -> list[Method]:
    """The methods of `evaluate.methods`, `dit` first; without that key, those that need no guesser and can work.

    Raises:
        DitError: a name that is no method, or a method that cannot work on these diffs.
    """
    label = EVALUATE.get(config, "label")
    named = list(EVALUATE.get(config, "methods"))
    if not named:
        has = {
            GUESSER: False,
            TRIGGER: all(has_trigger(row) for row in store.rows if row["split"] == "test"),
            ATTRIBUTES: any(known_labels(store, label).values()),
            TRIGGER_LABELS: label == "trigger",
        }
        named = [name for name, one in METHODS.items() if all(has[need] for need in one.needs)]
    # The report is about DIT.
    chosen = [find_method(name) for name in dict.fromkeys(("dit", *named))]
    topics = [store.rows[i] for i in store.indices(split="test", category="topic")]
    for one in chosen:
        one.check(topics, label)
    return chosen
