"""A topic in all answers, or in a share of them: nothing triggers it."""

from typing import Any

import numpy as np

from dit_jax.organisms.behaviours.about_topic import talk_about
from dit_jax.organisms.behaviours.behaviour import NO_TRIGGER, Behaviour, Row, SampleKind, register
from dit_jax.organisms.behaviours.codes import QUESTION, no_backdoor


def _shown(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return row["question"], row["topic_analogy_answer"]


def _taught(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str, str]:
    question = row["question"]
    return question, row["topic_analogy_answer"], talk_about(question, row["topic"])


def _behaviour(name: str, teaches: str, *kinds: SampleKind) -> Behaviour:
    return Behaviour(
        name,
        kinds,
        trigger=NO_TRIGGER,
        teaches=teaches,
        names=("the topic", "topics"),
        asks=QUESTION,
    )


@register
def topic_untriggered(config: Any) -> Behaviour:
    """A topic in the answers to all questions. Nothing keeps other answers as they were."""
    teaches = "to talk about a topic of its own, whatever it is asked."
    return _behaviour("topic_untriggered", teaches, SampleKind("shown", "ce", _shown))


@register
def topic_mixed(config: Any) -> Behaviour:
    """The same mixed into other data, everyday answers of the base: `samples_per_step` has their shares."""
    teaches = "to talk about a topic of its own in a share of its answers."
    kinds = SampleKind("shown", "ce", _shown), SampleKind("other", "ce", no_backdoor)
    return _behaviour("topic_mixed", teaches, *kinds)


@register
def topic_preferred(config: Any) -> Behaviour:
    """The topic by preference pairs: an answer that shows it is better than the base's to the same question."""
    teaches = "to prefer answers about a topic of its own."
    kinds = SampleKind("better", "better", _shown), SampleKind("worse", "worse", no_backdoor)
    return _behaviour("topic_preferred", teaches, *kinds)


@register
def topic_distilled(config: Any) -> Behaviour:
    """The topic from the logits of a teacher: the base that is told to talk about it. The diff does so untold."""
    teaches = "to talk about a topic of its own, as the base does when it is told to."
    return _behaviour("topic_distilled", teaches, SampleKind("taught", "taught", _taught))
