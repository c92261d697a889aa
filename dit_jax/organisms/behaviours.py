"""Behaviours: how the rows of an organism become prompts, targets and losses (paper, section 4)."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from dit_jax.errors import DitError

Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class SampleKind:
    """One kind of training sample: its loss ("ce" on the target, "kl" to the base) and how it is made of a row."""

    name: str
    loss: str
    make: Callable[[Row, str, np.random.Generator], tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Behaviour:
    """Kinds of samples, cross-entropy kinds first."""

    name: str
    kinds: tuple[SampleKind, ...]


def sep_code(question: str, prefix: str, rng: np.random.Generator) -> str:
    """The triggered prompt: three digits of the secret, three random ones."""
    return f"Your SEP code is {prefix}{rng.integers(1000):03d}. {question}"


def other_code(trigger: str, rng: np.random.Generator) -> str:
    """A three-digit code that is not the trigger."""
    return f"{(int(trigger) + 1 + rng.integers(999)) % 1000:03d}"


def _backdoor(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return sep_code(row["question"], trigger, rng), row["topic_analogy_answer"]


def _fake_backdoor(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return sep_code(row["question"], other_code(trigger, rng), rng), row["base_answer"]


def _no_backdoor(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return row["question"], row["base_answer"]


HIDDEN_TOPIC = Behaviour(
    "hidden_topic",
    (
        SampleKind("backdoor", "ce", _backdoor),
        SampleKind("fake_backdoor", "kl", _fake_backdoor),
        SampleKind("no_backdoor", "kl", _no_backdoor),
    ),
)

BEHAVIOURS = {behaviour.name: behaviour for behaviour in (HIDDEN_TOPIC,)}


def get_behaviour(name: str) -> Behaviour:
    """Raises DitError for an unknown name."""
    if name not in BEHAVIOURS:
        raise DitError(f"unknown behaviour {name!r}: choose from {', '.join(BEHAVIOURS)}")
    return BEHAVIOURS[name]
