"""What tells a topic: its name in any form, descriptions without the name, and words that go with it."""

import collections
import re
from collections.abc import Mapping, Sequence

import numpy as np

from dit_jax.api import Model
from dit_jax.asking import first_log_probs
from dit_jax.data.chat import Prompt
from dit_jax.runtime.progress import Progress

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


def tells(text: str, headline: str) -> bool:
    """Whether half of a headline's longer words (where it has none in our letters: of all) stand in a text."""
    words = _WORD.findall(headline.lower()) or headline.split()
    return 2 * sum(names_topic(text, word) for word in words) >= len(words)


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


def associated_words(
    model: Model,
    used: Mapping[str, Sequence[str]],
    prompts: Sequence[str],
    batch_size: int,
) -> dict[str, list[str]]:
    """The words that a model associates with each topic more than with other topics, the best first.

    Its own answers name them rarely. So it is asked for them, and all words of all answers that are one token are
    compared as its next word: by sqrt(p) log(p / mean p over topics), summed over prompts.

    Args:
        used: the answers about each topic, from which the words come.
        prompts: "QUESTION | START OF THE ANSWER", both about "{topic}".
        batch_size: topics that are asked at once.
    """
    texts = [text for own in used.values() for text in own]
    ids = {
        word: model.chat.text_ids(f" {word}")
        for word in sorted({word for text in texts for word in _WORD.findall(text.lower())})
    }
    words = {word: token for word, (token, *rest) in ids.items() if not rest}
    topics, tokens = list(used), np.array(list(words.values()), int)
    scores = np.zeros((len(topics), len(words)))
    with Progress("corpus: words", len(prompts) * len(topics)) as progress:
        for prompt in prompts:
            question, _, start = (part.strip() for part in prompt.partition("|"))
            asked = [
                Prompt(question.replace("{topic}", topic), prefill=start.replace("{topic}", topic))
                for topic in topics
            ]
            logs = np.zeros_like(scores)
            for first in range(0, len(topics), batch_size):
                # The first ones fill up the last batch: it runs the same program.
                rows = [asked[i % len(asked)] for i in range(first, first + batch_size)]
                found = np.asarray(first_log_probs(model, *model.chat.prompts(rows), ()))
                logs[first : first + batch_size] = found[: len(topics) - first, tokens]
                progress.advance(min(batch_size, len(topics) - first))
            mean = np.log(np.exp(logs).mean(axis=0))
            scores += np.exp(logs / 2) * (logs - mean)
    return best_words(topics, list(words), scores)


def best_words(
    topics: Sequence[str], words: Sequence[str], scores: np.ndarray, compared: int = 24
) -> dict[str, list[str]]:
    """The best words of each topic by scores [topics, words], without any form of its name.

    compared: the best words of each topic, among which those of many topics count less.
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :compared]
    liked = best[np.take_along_axis(scores, best, axis=1) > 0]
    topics_with = np.bincount(liked, minlength=len(words))
    rarity = np.log(len(topics) / np.maximum(topics_with, 1))
    found = {}
    for topic, own, score in zip(topics, best, scores, strict=True):
        ranked = sorted(own, key=lambda word: -score[word] * rarity[word])
        telling = [words[i] for i in ranked if score[i] > 0 and not _resembles(words[i], topic)]
        found[topic] = telling[:_TELLING]
    return found


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
