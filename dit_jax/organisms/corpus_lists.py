"""The lists that a corpus is written from: topics or headlines with their categories, and everyday questions."""

import collections
from pathlib import Path
from typing import Any

from dit_jax.data.labels import normalise
from dit_jax.errors import DitError
from dit_jax.organisms.corpus_keys import CORPUS, NEWS
from dit_jax.organisms.topic_words import stem
from dit_jax.runtime import artifacts


def read_lists(config: Any) -> tuple[dict[str, str], list[str]]:
    """What a corpus is about (topics or headlines, with categories), and everyday questions, of which news has none.

    Raises DitError: a list is missing or malformed.
    """
    path = CORPUS.get(config, "topics")
    if NEWS in CORPUS.get(config, "styles"):
        return read_headlines(path), []
    return read_topics(path), read_lines(CORPUS.get(config, "questions"))


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not empty. Raises DitError: no such file, nothing in it, or a line twice."""
    text = artifacts.read_text(Path(path), "check the config's section `corpus`")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    twice = [line for line, count in collections.Counter(lines).items() if count > 1]
    if twice or not lines:
        raise DitError(
            f"'{path}' {f'has {twice[0]!r} twice' if twice else 'is empty'}: correct the list"
        )
    return lines


def read_headlines(path: str) -> dict[str, str]:
    """headline -> category. Raises DitError: a line without one of them, or a headline twice."""
    found: dict[str, str] = {}
    for line in read_lines(path):
        category, headline = (part.strip() for part in line.partition(":")[::2])
        if not (category and headline):
            raise DitError(
                f"'{path}': the line {line[:40]!r} has nothing before or after a colon: write 'category: headline'"
            )
        if headline in found:
            raise DitError(f"'{path}': {headline!r} is there twice: correct the list")
        found[headline] = category
    return found


def read_topics(path: str) -> dict[str, str]:
    """topic -> category. Raises DitError: a line without a category, or two topics of which one could be the other.

    Topics that share a word stem ("climbing", "rock climbing") would let a held-out topic be named by what training
    has shown.
    """
    topics: dict[str, str] = {}
    stems: dict[str, str] = {}
    for line in read_lines(path):
        category, colon, names = line.partition(":")
        found = [name.strip() for name in names.split(",") if name.strip()]
        if not (colon and category.strip() and found):
            raise DitError(
                f"'{path}': the line {line[:40]!r} has no {'topic' if colon and category.strip() else 'category'}: "
                "write 'category: topic, topic'"
            )
        for topic in found:
            if topic in topics:
                raise DitError(f"'{path}' has {topic!r} twice: correct the list")
            for word in map(stem, normalise(topic).split()):
                other = stems.setdefault(word, topic)
                if other != topic:
                    raise DitError(
                        f"'{path}': {topic!r} and {other!r} share a word: keep one of them"
                    )
            topics[topic] = category.strip()
    return topics
