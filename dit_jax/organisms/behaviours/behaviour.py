"""What a behaviour is, and the table of those that configs can name (docs/behaviours.md)."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.config.user_code import import_object
from dit_jax.data.labels import normalise
from dit_jax.errors import DitError

Row = Mapping[str, str]
# What the index of a store has for diffs that show their behaviour without a trigger.
NO_TRIGGER = "N/A"
PAIR = ("better", "worse")  # losses of the two answers of a pair
TO_BASE = ("kl", "taught")  # losses that compare with the base


@dataclasses.dataclass(frozen=True)
class SampleKind:
    """One kind of training sample.

    loss: "ce" on the target, or "kl" to the base on it; "taught": KL to the base on it as it answers another prompt;
        "better" and "worse": the two answers of a pair, of which one is preferred (`preference_loss`).
    make: (row, trigger, rng) -> (prompt, target), and the other prompt if it is taught; None where a row has no such
        sample.
    """

    name: str
    loss: str
    make: Callable[[Row, str, np.random.Generator], tuple[str, ...] | None]


def shows_any(answer: str, keywords: Sequence[str]) -> bool:
    """Whether one of the keywords stands in the answer as whole words."""
    text = f" {normalise(answer)} "
    return any(f" {normalise(word)} " in text for word in keywords)


Asker = Callable[[str, str, np.random.Generator], str]


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """How rows of data become finetuning samples, and how to tell that a diff has learnt what it should.

    name: its name in the index of a store.
    kinds: the kinds of samples, cross-entropy first; or one "better" and one "worse", and KL after them.
    triggered: (question, trigger, rng) -> the question with the trigger in it; None: there is no trigger.
    mistriggered: the same with a wrong trigger, to which the diff must not react; None: there is no wrong trigger.
    trigger: the value of the index column `trigger`; "": each organism has its own.
    triggers: what they are drawn from; (): three digits.
    question: row -> the question that the gate asks; if there is no trigger, answers to it must show the behaviour.
    shows: (answer, keywords) -> whether an answer shows the behaviour.
    label: (topic, trigger) -> what the adapter should say about a diff.
    teaches: what each finetuned model learns, for reports: "to talk about …"; "": they say the behaviour's name.
    names: what labels are, one and several of them. sentences: whether they are sentences, to be graded rather than
        matched. asks: the question that an adapter is asked by default; "": there is none.
    """

    name: str
    kinds: tuple[SampleKind, ...]
    triggered: Asker | None = None
    mistriggered: Asker | None = None
    trigger: str = ""
    triggers: Sequence[str] = ()
    question: Callable[[Row], str] = lambda row: row["question"]
    shows: Callable[[str, Sequence[str]], bool] = shows_any
    label: Callable[[str, str], str] = lambda topic, trigger: topic
    teaches: str = ""
    names: tuple[str, str] = ("the label", "labels")
    sentences: bool = False
    asks: str = ""

    def __post_init__(self) -> None:
        losses = [kind.loss for kind in self.kinds]
        wrong = next((x for x in losses if x not in ("ce", *TO_BASE, *PAIR)), None)
        if wrong is not None:
            raise DitError(f"behaviour {self.name}: unknown loss {wrong!r}: choose 'ce' or 'kl'")
        paired = any(loss in PAIR for loss in losses)
        if paired and (tuple(losses[:2]) != PAIR or set(losses[2:]) - set(TO_BASE)):
            raise DitError(
                f"behaviour {self.name}: pairs have one kind of samples of loss 'better', then one of 'worse', then "
                "those of 'kl'"
            )
        if not paired and (not losses or losses != sorted(losses)):
            raise DitError(
                f"behaviour {self.name}: list its kinds of samples with those of loss 'ce' first"
            )
        if self.triggered is None and self.trigger not in ("", NO_TRIGGER):
            raise DitError(f"behaviour {self.name} has a trigger but no function `triggered`")

    @property
    def taught(self) -> bool:
        """Whether some samples are compared with the base under another prompt."""
        return any(kind.loss == "taught" for kind in self.kinds)

    @property
    def paired(self) -> bool:
        """Whether its first two kinds of samples are pairs of a better and a worse answer."""
        return self.kinds[0].loss == PAIR[0]


Factory = Callable[[Any], Behaviour]
BEHAVIOURS: dict[str, Factory] = {}
_LOADED: dict[str, Behaviour] = {}


def register(factory: Factory) -> Factory:
    """Makes a behaviour known by its function's name: `diffs.behaviour = "hidden_topic"`.

    The function takes the `diffs` section of a config and returns a `Behaviour`.
    """
    BEHAVIOURS[factory.__name__] = factory
    return factory


def get_behaviour(config: Any) -> Behaviour:
    """The behaviour that the `diffs` section of a config names: a known name, or "package.module:function".

    Raises:
        DitError: the name is unknown, the module or function does not exist or makes no `Behaviour`, or it reads a key
            that `diffs` lacks.
    """
    name = str(config.behaviour)
    factory = import_object(name, "behaviour") if ":" in name else BEHAVIOURS.get(name)
    if factory is None:
        raise DitError(
            f"unknown behaviour {name!r}: choose from {', '.join(BEHAVIOURS)}, or give the import path "
            "'package.module:function' of your own (docs/behaviours.md)"
        )
    try:
        behaviour = factory(config)
    except (AttributeError, KeyError) as error:
        key = _absent_key(error)
        if key is None or key in config:
            raise
        raise DitError(
            f"behaviour {name!r} reads the config key 'diffs.{key}', which is absent: add it"
        ) from error
    if not isinstance(behaviour, Behaviour):
        raise DitError(f"behaviour {name!r} made a {type(behaviour).__name__}, not a Behaviour")
    _LOADED[name] = _LOADED[behaviour.name] = behaviour
    return behaviour


def _absent_key(error: Exception) -> str | None:
    """The key that a ConfigDict says it does not hold; None if the error is another."""
    inner = error.args[0] if isinstance(error, AttributeError) and error.args else error
    found = re.match(r"'(\w+)'", str(inner.args[0])) if isinstance(inner, KeyError) else None
    return found[1] if found else None


def known_behaviour(name: str) -> Behaviour | None:
    """A behaviour by its name or by the import path in a config: registered, or named by a config before; else None."""
    if name not in _LOADED and name in BEHAVIOURS:
        return BEHAVIOURS[name]({})  # what it reads from the config has its default
    return _LOADED.get(name)


def behaviour_named(name: str) -> Behaviour:
    """The behaviour of a diff by the name in its store, which is registered or was named by a config before.

    Stores are untrusted, so names are looked up and never imported. Raises DitError: the name is unknown.
    """
    if (found := known_behaviour(name)) is not None:
        return found
    raise DitError(
        f"unknown behaviour {name[:80]!r} of a diff: name it in the config key 'diffs.behaviour'"
    )


def possible_triggers(behaviour: Behaviour) -> list[str]:
    """All triggers that a diff of a behaviour may have; [] if it has none."""
    if behaviour.triggered is None:
        return []
    if behaviour.trigger:
        return [behaviour.trigger]
    return list(behaviour.triggers) or [f"{code:03d}" for code in range(1000)]


def triggered(row: Mapping[str, Any], question: str, rng: np.random.Generator) -> str:
    """A question with the trigger of a diff in it, put there by its behaviour.

    Args:
        row: of a store's index, with the columns `trigger` and `behaviour` (absent: hidden_topic).

    Raises:
        DitError: the behaviour is unknown or has no trigger.
    """
    behaviour = behaviour_named(str(row.get("behaviour") or "hidden_topic"))
    if behaviour.triggered is None:
        raise DitError(f"diffs of the behaviour {behaviour.name!r} have no trigger")
    if row["trigger"] == NO_TRIGGER:
        return question
    return behaviour.triggered(question, str(row["trigger"]), rng)
