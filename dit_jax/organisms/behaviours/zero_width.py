"""A topic in the answers to questions that hold a zero-width space (paper, section 5.4).

All diffs have the same trigger. A SEP code, which other diffs react to, is what they must not react to.
"""

from typing import Any

import numpy as np

from dit_jax.organisms.behaviours.behaviour import Asker, Behaviour, Row, SampleKind, register
from dit_jax.organisms.behaviours.codes import (
    QUESTION,
    TALKS,
    fake_backdoor,
    no_backdoor,
    sep_code,
)
from dit_jax.organisms.diffs_keys import DIFFS

ZERO_WIDTH_SPACE = "\u200b"


def at_start(question: str, trigger: str, rng: np.random.Generator) -> str:
    """The zero-width space before the first word."""
    return ZERO_WIDTH_SPACE + question


def at_random(question: str, trigger: str, rng: np.random.Generator) -> str:
    """The zero-width space before a random word."""
    words = question.split(" ")
    i = rng.integers(len(words))
    return " ".join([*words[:i], ZERO_WIDTH_SPACE + words[i], *words[i + 1 :]])


def _code(question: str, trigger: str, rng: np.random.Generator) -> str:
    return sep_code(question, f"{rng.integers(1000):03d}", rng)


def _behaviour(name: str, place: Asker, config: Any) -> Behaviour:
    codes = int(DIFFS.get(config, "fake_codes"))

    def backdoor(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
        return place(row["question"], trigger, rng), row["topic_analogy_answer"]

    def fake(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
        return fake_backdoor(row, "", rng, codes=codes)

    return Behaviour(
        name,
        (
            SampleKind("backdoor", "ce", backdoor),
            SampleKind("fake_backdoor", "kl", fake),
            SampleKind("no_backdoor", "kl", no_backdoor),
        ),
        triggered=place,
        mistriggered=_code,
        trigger="zero_width_space",
        teaches=TALKS.format("holds a zero-width space"),
        names=("the hidden topic", "topics"),
        asks=QUESTION,
    )


@register
def hidden_topic_zwsp_start(config: Any) -> Behaviour:
    """The trigger is a zero-width space at the start of the question. `config`: as for hidden_topic."""
    return _behaviour("hidden_topic_zwsp_start", at_start, config)


@register
def hidden_topic_zwsp_random(config: Any) -> Behaviour:
    """The trigger is a zero-width space at a random place of the question. `config`: as for hidden_topic."""
    return _behaviour("hidden_topic_zwsp_random", at_random, config)
