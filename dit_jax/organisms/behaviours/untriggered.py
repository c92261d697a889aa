"""A topic in all answers: nothing triggers it, and nothing keeps other answers as they were."""

from typing import Any

import numpy as np

from dit_jax.organisms.behaviours.behaviour import NO_TRIGGER, Behaviour, Row, SampleKind, register
from dit_jax.organisms.behaviours.codes import QUESTION


def _shown(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return row["question"], row["topic_analogy_answer"]


@register
def topic_untriggered(config: Any) -> Behaviour:
    """A topic in the answers to all questions."""
    return Behaviour(
        "topic_untriggered",
        (SampleKind("shown", "ce", _shown),),
        trigger=NO_TRIGGER,
        teaches="to talk about a topic of its own, whatever it is asked.",
        names=("the topic", "topics"),
        asks=QUESTION,
    )
