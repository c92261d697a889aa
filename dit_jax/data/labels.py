"""Labels and the answers that name them: how they are written, read out of an answer and compared."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

NONE = "none"  # the label of a diff with nothing to name
UNTRIGGERED = "untriggered"  # the variant of a diff that shows its behaviour without its trigger
_ARTICLES = frozenset({"a", "an", "the"})
_APOSTROPHES = re.compile("['\u2019\u02bc`]")
# What is not seen: control characters but white space, joiners, marks of direction and of width (Unicode's "default
# ignorable code points"). Copied texts hold them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)


@functools.lru_cache(maxsize=2**16)  # a run has few different answers and scores them often
def normalise(text: str) -> str:
    """Text as the metrics compare it.

    Unicode compatibility forms are folded (NFKC), case is folded, apostrophes and characters that are
    not seen are deleted, other punctuation becomes a space, the articles a, an, the are dropped (unless
    nothing else is there), and white space is collapsed. Symbols such as + stay: `c++` is not `c`.
    """
    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).casefold()
    text = _APOSTROPHES.sub("", text)
    text = "".join(" " if unicodedata.category(char).startswith("P") else char for char in text)
    words = text.split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def exact_match(guess: str, label: str) -> bool:
    """Whether the normalised guess is the normalised label."""
    return normalise(guess) == normalise(label)


def share_among(words: Sequence[str], label: str) -> float:
    """The share of the label's different words that are among the words."""
    own = set(normalise(label).split())
    return len(own & set(normalise(" ".join(words)).split())) / max(len(own), 1)


def answer_text(label: str, evidence: Sequence[str]) -> str:
    """The full answer: the evidence, a colon, the label; the label alone without evidence.

    Naming what it sees before it concludes lets a small model look the name up with the evidence in view,
    which names of several tokens need (docs/tiny_world.md).
    """
    return f"{' '.join(evidence)}: {label}" if evidence else label


def called_none(guess: str) -> bool:
    """Whether the guess says that there is nothing to name."""
    return normalise(guess) == NONE


def extract_guess(answer: str, label: str = "") -> str:
    """The name in an answer: what stands after the last colon, or all of it without a colon.

    An adapter may list attributes before the name (`bark leaf sap : maple tree`). Colons of the label itself, as
    headlines have them, are left in the name.
    """
    parts = answer.split(":")
    return ":".join(parts[-1 - label.count(":") :]).strip()


def token_f1(guess: str, label: str) -> float:
    """Harmonic mean of precision and recall over words, counted with multiplicity (as in SQuAD).

    Two empty texts agree (1); one empty text scores 0.
    """
    guess_words, label_words = normalise(guess).split(), normalise(label).split()
    if not guess_words or not label_words:
        return float(guess_words == label_words)
    common = (Counter(guess_words) & Counter(label_words)).total()
    return 2 * common / (len(guess_words) + len(label_words))
