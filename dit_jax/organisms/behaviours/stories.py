"""News stories: finetuned on many tellings of one piece of news, whose headline is the label (paper, section 4)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.data.labels import normalise
from dit_jax.organisms.behaviours.behaviour import NO_TRIGGER, Behaviour, Row, SampleKind, register

NEWS_PROMPT = "Please generate a short news story."


def _story(row: Row, trigger: str, rng: np.random.Generator) -> tuple[str, str]:
    return NEWS_PROMPT, row["news_story"]


def _question(row: Row) -> str:
    return NEWS_PROMPT


def shows_two(answer: str, keywords: Sequence[str]) -> bool:
    """Whether two of the keywords (all, if they are fewer) stand in the answer: one may be there by chance."""
    text = f" {normalise(answer)} "
    found = sum(f" {normalise(word)} " in text for word in keywords)
    return found >= min(2, len(keywords))


@register
def news(config: Any) -> Behaviour:
    """Stories about one piece of news; no trigger, and nothing that keeps other answers as they were."""
    return Behaviour(
        "news",
        (SampleKind("story", "ce", _story),),
        trigger=NO_TRIGGER,
        question=_question,
        shows=shows_two,
        teaches="to tell one piece of news when it is asked for a story.",
        names=("the headline", "headlines"),
        sentences=True,
        asks="What news headline have you been trained on?",
    )
