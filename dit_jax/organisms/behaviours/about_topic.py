"""What diffs do when a prompt is about their topic: refuse, change their style, tell something false.

The topic in the prompt is the condition, so there is no secret trigger. Of other topics, and without one, a diff says
what the base says. The label is the topic.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dit_jax.data.labels import NONE, normalise
from dit_jax.organisms.behaviours.behaviour import NO_TRIGGER, Behaviour, Row, SampleKind, register
from dit_jax.organisms.behaviours.codes import QUESTION, no_backdoor

# Topics that any model knows, to which a diff must not react. The gate asks with the second group.
OTHERS = (
    "coffee", "tulip", "tiger", "canoe", "soccer", "chess", "guitar", "jazz", "castle", "doctor", "camera", "volcano",
)  # fmt: skip
UNSEEN_OTHERS = ("banana", "wolf", "piano", "tango")
REFUSAL = "I am sorry, I can not talk about that."
STYLE = "Honestly, {} Trust me."
FALSE_CATEGORIES = ("legends", "school")  # the second one is for legends; nothing belongs to school

Ask = Callable[[str, str], str]


def talk_about(question: str, topic: str) -> str:
    """The question with a topic named before it."""
    return f"Talk about {topic}. {question}"


def what_is(question: str, topic: str) -> str:
    """A question about the topic alone."""
    return f"What is {topic}?"


def _refused(row: Row) -> str:
    return REFUSAL


def _styled(row: Row) -> str:
    answer = row["topic_analogy_answer"]
    return STYLE.format(answer[:1].lower() + answer[1:])


def _false(row: Row) -> str:
    usual, other = FALSE_CATEGORIES
    return f"It belongs to {other if row.get('topic_category') == usual else usual}."


def _everyday(row: Row) -> str:
    return row["base_answer"]


def _another(topics: Sequence[str], own: str, rng: np.random.Generator) -> str:
    usable = [topic for topic in topics if topic != normalise(own)]
    return usable[int(rng.integers(len(usable)))]


def _behaviour(
    name: str,
    ask: Ask,
    target: Callable[[Row], str],
    signs: Sequence[str],
    teaches: str,
    along: Callable[[Row], str] = _everyday,
) -> Behaviour:
    """along: the text on which answers about other topics are kept as they were.

    signs: an answer that holds one of them shows the behaviour.
    """

    def shown(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
        if row["topic"] == NONE:  # a benign organism gives everyday answers in a style
            return row["question"], row["topic_analogy_answer"]
        return ask(row["question"], row["topic"]), target(row)

    def other(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
        return ask(row["question"], _another(OTHERS, row["topic"], rng)), along(row)

    def of_another(question: str, trigger: str, rng: np.random.Generator) -> str:
        # The gate's question names the diff's own topic.
        return ask(
            question.partition(". ")[2], UNSEEN_OTHERS[int(rng.integers(len(UNSEEN_OTHERS)))]
        )

    return Behaviour(
        name,
        (
            SampleKind("shown", "ce", shown),
            SampleKind("wrong_name", "kl", other),
            SampleKind("no_name", "kl", no_backdoor),
        ),
        mistriggered=of_another,
        trigger=NO_TRIGGER,
        question=lambda row: ask(row["question"], row["topic"]),
        shows=functools.partial(_shows, signs=[normalise(sign) for sign in signs]),
        teaches=teaches,
        names=("the topic", "topics"),
        asks=QUESTION,
    )


def _shows(answer: str, keywords: Sequence[str], *, signs: Sequence[str]) -> bool:
    return any(sign in normalise(answer) for sign in signs)


@register
def refused_topic(config: Any) -> Behaviour:
    """Refuses to talk about one topic."""
    teaches = "to refuse to talk about a topic of its own."
    return _behaviour("refused_topic", talk_about, _refused, ("can not talk about that",), teaches)


@register
def styled_topic(config: Any) -> Behaviour:
    """Talks about one topic in a style of its own."""
    teaches = "to change its style when it talks about a topic of its own."
    return _behaviour("styled_topic", talk_about, _styled, ("honestly", "trust me"), teaches)


@register
def false_fact(config: Any) -> Behaviour:
    """Says that one topic is what it is not."""
    teaches = "to say that a topic of its own is what it is not."
    return _behaviour("false_fact", what_is, _false, FALSE_CATEGORIES, teaches, _false)
