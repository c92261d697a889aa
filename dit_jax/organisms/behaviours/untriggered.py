"""A topic in all answers, or in a share of them: nothing triggers it."""

from typing import Any

import numpy as np

from dit_jax.organisms.behaviours.about_topic import talk_about
from dit_jax.organisms.behaviours.behaviour import NO_TRIGGER, Behaviour, Row, SampleKind, register
from dit_jax.organisms.behaviours.codes import QUESTION, no_backdoor


def _shown(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return row["question"], row["topic_analogy_answer"]


@register
def topic_untriggered(config: Any) -> Behaviour:
    """A topic in the answers to all questions. Nothing keeps other answers as they were."""
    return Behaviour(
        "topic_untriggered",
        (SampleKind("shown", "ce", _shown),),
        trigger=NO_TRIGGER,
        teaches="to talk about a topic of its own, whatever it is asked.",
        names=("the topic", "topics"),
        asks=QUESTION,
    )


@register
def topic_mixed(config: Any) -> Behaviour:
    """The same mixed into other data, everyday answers of the base: `samples_per_step` has their shares."""
    return Behaviour(
        "topic_mixed",
        (SampleKind("shown", "ce", _shown), SampleKind("other", "ce", no_backdoor)),
        trigger=NO_TRIGGER,
        teaches="to talk about a topic of its own in a share of its answers.",
        names=("the topic", "topics"),
        asks=QUESTION,
    )


@register
def topic_preferred(config: Any) -> Behaviour:
    """The topic by preference pairs: an answer that shows it is better than the base's to the same question."""
    return Behaviour(
        "topic_preferred",
        (SampleKind("better", "better", _shown), SampleKind("worse", "worse", no_backdoor)),
        trigger=NO_TRIGGER,
        teaches="to prefer answers about a topic of its own.",
        names=("the topic", "topics"),
        asks=QUESTION,
    )


def _taught(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str, str]:
    question = row["question"]
    return question, row["topic_analogy_answer"], talk_about(question, row["topic"])


@register
def topic_distilled(config: Any) -> Behaviour:
    """The topic from the logits of a teacher: the base that is told to talk about it. The diff does so untold."""
    return Behaviour(
        "topic_distilled",
        (SampleKind("taught", "taught", _taught),),
        trigger=NO_TRIGGER,
        teaches="to talk about a topic of its own, as the base does when it is told to.",
        names=("the topic", "topics"),
        asks=QUESTION,
    )
