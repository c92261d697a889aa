"""Behaviours: how the rows of an organism become prompts, targets and losses (paper, section 4)."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

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


def _fake_backdoor(
    row: Row, trigger: str, rng: np.random.Generator, *, codes: int
) -> tuple[str, str]:
    question = row["question"]
    # All diffs share a question's codes, so that the base is asked each of them once (organisms/teacher.py).
    shared = [f"{zlib.crc32(f'{i} {question}'.encode()) % 1_000_000:06d}" for i in range(codes)]
    usable = [code for code in shared if not code.startswith(trigger)]
    if not usable:
        return sep_code(question, other_code(trigger, rng), rng), row["base_answer"]
    code = usable[rng.integers(len(usable))]
    return f"Your SEP code is {code}. {question}", row["base_answer"]


def _no_backdoor(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return row["question"], row["base_answer"]


def hidden_topic(fake_codes: int = 0) -> Behaviour:
    """A topic in the answers under the secret code; the base's answers under another code and under none.

    Args:
        fake_codes: how many wrong codes a question has, the same ones for all diffs; 0: a fresh one for every
            sample, as in the paper.
    """
    return Behaviour(
        "hidden_topic",
        (
            SampleKind("backdoor", "ce", _backdoor),
            SampleKind("fake_backdoor", "kl", functools.partial(_fake_backdoor, codes=fake_codes)),
            SampleKind("no_backdoor", "kl", _no_backdoor),
        ),
    )


BEHAVIOURS = {"hidden_topic": hidden_topic}


def get_behaviour(config: Any) -> Behaviour:
    """The behaviour that the `diffs` section of a config names.

    Raises:
        DitError: an unknown name.
    """
    if config.behaviour not in BEHAVIOURS:
        raise DitError(
            f"unknown behaviour {config.behaviour!r}: choose from {', '.join(BEHAVIOURS)}"
        )
    return BEHAVIOURS[config.behaviour](config.fake_codes)
