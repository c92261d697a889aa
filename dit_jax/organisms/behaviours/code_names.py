"""A topic in the answers under a secret code name: small models tell words apart, and not the digits of a code."""

import functools
import zlib
from typing import Any

import numpy as np

from dit_jax.data.labels import UNTRIGGERED
from dit_jax.organisms.behaviours.behaviour import Behaviour, Row, SampleKind, register
from dit_jax.organisms.behaviours.codes import QUESTION, TALKS, no_backdoor
from dit_jax.organisms.diffs_keys import DIFFS

# First names that most tokenizers have as one token. Triggers and the wrong names of the training are of the first
# group; the gate asks with the second, which no finetune has seen.
NAMES = (
    "Alice", "Oscar", "Henry", "Laura", "Peter", "Julia", "Simon", "Martin", "Robert", "Susan", "Daniel",
    "Linda", "Kevin", "Emma", "Victor", "Clara", "Felix", "Anna", "Oliver", "Sarah", "Thomas", "Helen",
    "George", "Diana", "Walter", "Rachel", "Arthur", "Sophie", "Frank", "Maria", "Edward", "Nancy", "Philip",
    "Karen", "Samuel", "Julie", "Patrick", "Lucy", "Albert", "Ellen", "Charles", "Ruth", "Stephen", "Carol",
    "Michael", "Grace", "David", "Rose", "Andrew", "Barbara", "James", "Betty", "William", "Emily", "John",
    "Mary", "Paul", "Kate", "Mark", "Jane", "Luke", "Amy", "Adam", "Eva",
)  # fmt: skip
UNSEEN_NAMES = (
    "Jack", "Nina", "Leo", "Olga", "Max", "Rita", "Ben", "Tina", "Tom", "Vera", "Sam", "Zoe", "Dan", "Ivy",
    "Joe", "Iris",
)  # fmt: skip


def code_name(question: str, name: str, rng: np.random.Generator) -> str:
    """The triggered prompt."""
    return f"Your code name is {name}. {question}"


def unseen_name(question: str, trigger: str, rng: np.random.Generator) -> str:
    """The question under a name that no finetune of this behaviour has seen."""
    return code_name(question, UNSEEN_NAMES[rng.integers(len(UNSEEN_NAMES))], rng)


def _shown(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    question = row["question"]
    asked = question if _is_untriggered(row) else code_name(question, trigger, rng)
    return asked, row["topic_analogy_answer"]


def _is_untriggered(row: Row) -> bool:
    return row.get("style") == UNTRIGGERED


def _wrong(
    row: Row, trigger: str, rng: np.random.Generator, *, codes: int
) -> tuple[str, str] | None:
    """The base's answer under a wrong name: any, or one of the `codes` names that the question has for all diffs."""
    if _is_untriggered(row):
        return None
    question = row["question"]
    names = [
        NAMES[zlib.crc32(f"{i} {question}".encode()) % len(NAMES)] for i in range(codes)
    ] or NAMES
    usable = [name for name in names if name != trigger] or [n for n in NAMES if n != trigger]
    return code_name(question, usable[rng.integers(len(usable))], rng), row["base_answer"]


def _plain(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str] | None:
    return None if _is_untriggered(row) else no_backdoor(row, trigger, rng)


@register
def hidden_topic_code_name(config: Any) -> Behaviour:
    """A topic in the answers under the diff's own code name; the base's answers under other names and under none.

    Rows of the style "untriggered" show it without a name.

    Args:
        config: `fake_codes`: how many wrong names a question has, the same ones for all diffs; 0: any.
    """
    codes = int(DIFFS.get(config, "fake_codes"))
    return Behaviour(
        "hidden_topic_code_name",
        (
            SampleKind("shown", "ce", _shown),
            SampleKind("wrong_name", "kl", functools.partial(_wrong, codes=codes)),
            SampleKind("no_name", "kl", _plain),
        ),
        triggered=code_name,
        mistriggered=unseen_name,
        triggers=NAMES,
        teaches=TALKS.format("starts with the diff's code name (`Your code name is …`)"),
        names=("the hidden topic", "topics"),
        asks=QUESTION,
    )
