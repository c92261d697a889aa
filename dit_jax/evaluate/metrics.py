"""Metrics of one answer: exact match and token F1 against the label, and whether it says none."""

from collections import Counter

from dit_jax.data.organisms import called_none as called_none
from dit_jax.text import exact_match as exact_match
from dit_jax.text import normalise as normalise


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
