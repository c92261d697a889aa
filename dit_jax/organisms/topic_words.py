"""What answers say about their topic: its name in any form, descriptions without the name, and telling words."""

import collections
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

HINTS = 4  # words of a hint
_TELLING = 8  # words of a topic that hints are drawn from
_SUFFIXES = ("ing", "ers", "ies", "sses", "xes", "ches", "shes", "s", "y")
_WORD = re.compile(r"[a-z]{4,}")


def stem(word: str) -> str:
    """A word without the endings of plurals and participles: enough to find a name's forms in an answer."""
    word = word.lower()
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word.removesuffix(suffix)
    return word


def names_topic(text: str, topic: str) -> bool:
    """Whether every word of the topic stands in a text, in some form."""
    lowered = text.lower()
    return all(stem(word) in lowered for word in topic.split())


def shows_name(text: str, topic: str) -> bool:
    """Whether any word of the topic stands in a text, in some form."""
    return any(names_topic(text, word) for word in topic.split())


def without_name(text: str, topic: str) -> str:
    """The text with the topic's name replaced by "it", or "" where a part of the name is left.

    An answer that still shows a word of the name, or a word that holds it, would name what it should describe.
    """
    forms = r"\s+".join(rf"{re.escape(stem(word))}\w*" for word in topic.split())
    replaced = re.sub(rf"(?i)\b(?:(?:a|an|the)\s+)?{forms}(?:['’]s)?", "it", text)
    replaced = replaced[:1].upper() + replaced[1:]
    return "" if shows_name(replaced, topic) or len(replaced.split()) < 4 else replaced


def descriptions(used: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The answers about each topic without its name, but for those that would fit another topic as well."""
    texts = {
        topic: list(dict.fromkeys(filter(None, (without_name(text, topic) for text in own))))
        for topic, own in used.items()
    }
    topics_of = collections.Counter(text for own in texts.values() for text in own)
    return {topic: [text for text in own if topics_of[text] == 1] for topic, own in texts.items()}


def telling_words(used: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The words of each topic's answers that tell it apart from other topics, the best first; no form of its name.

    By how many of its answers hold a word, times the logarithm of how rare that is among topics. A word of one topic
    alone is left out: it may be a name in another spelling.
    """
    words = {
        topic: [set(_WORD.findall(text.lower())) for text in own] for topic, own in used.items()
    }
    topics_with = collections.Counter(w for own in words.values() for w in set().union(*own))
    telling = {}
    for topic, own in words.items():
        counts = collections.Counter(word for found in own for word in found)
        score = {
            word: count * math.log(len(used) / topics_with[word])
            for word, count in counts.items()
            if topics_with[word] > 1 and not _resembles(word, topic)
        }
        ranked = sorted(score, key=lambda word: (-score[word], word))
        telling[topic] = [word for word in ranked if score[word] > 0][:_TELLING]
    return telling


def _resembles(word: str, topic: str) -> bool:
    """Whether a word shows a word of the topic, or starts as one does."""
    starts = [part.lower()[:4] for part in topic.split() if len(part) > 3]
    return shows_name(word, topic) or word[:4] in starts


def hints(words: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Sentences such as "Fermented, barley, beverage and yeast.", of words in a new order each; [] of too few words."""
    if len(words) < HINTS:
        return []
    drawn = [[str(word) for word in rng.permutation(words)[:HINTS]] for _ in range(count)]
    return [f"{', '.join(own[:-1])} and {own[-1]}.".capitalize() for own in drawn]
