"""Texts as they are compared everywhere: labels of a corpus, words that a gate looks for, guesses."""

import functools
import re
import unicodedata

_ARTICLES = frozenset({"a", "an", "the"})
_APOSTROPHES = re.compile("['\u2019\u02bc`]")


@functools.lru_cache(maxsize=2**16)  # a run has few different answers and scores them often
def normalise(text: str) -> str:
    """Text as the metrics compare it.

    Unicode compatibility forms are folded (NFKC), case is folded, apostrophes are deleted, other
    punctuation becomes a space, the articles a, an, the are dropped (unless nothing else is there),
    and white space is collapsed. Symbols such as + stay: `c++` is not `c`.
    """
    text = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(" " if unicodedata.category(char).startswith("P") else char for char in text)
    words = text.split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact_match(guess: str, label: str) -> bool:
    """Whether the normalised guess is the normalised label."""
    return normalise(guess) == normalise(label)
