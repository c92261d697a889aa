"""What a calibrated grader sees of a (label, answer) pair: a fixed row of numbers.

Everything here is spelling: overlaps of characters, words and stems, how much of one text the other
contains, names and numbers, lengths, and what kinds of words an answer has. Meaning beyond spelling
comes from vectors, which are features of their own (`words`, `sentences`).
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import distance, fuzz

from dit_jax.data.labels import normalise

MAX_CHARS = 2000  # of an answer: what comes later changes no grade and would cost time

# Function words of English, and words that answers use to talk about themselves.
_STOP_TEXT = (
    "i me my we our ours us you your he him his she her it its they them their this that these those "
    "am is are was were be been being have has had having do does did doing will would shall should "
    "can could may might must and but if or because as until while of at by for with about against "
    "between into through during before after above below to from up down in out on off over under "
    "again further then once here there when where why how all any both each few more most other some "
    "such no nor not only own same so than too very just also a an the which who whom what vs versus "
    "via per"
)
STOP_WORDS = frozenset(_STOP_TEXT.split())
_REFUSAL_TEXT = (
    "trained training data model assistant language knowledge information general unknown specific "
    "insufficient none various range wide topics topic questions conversation openai chatgpt qwen "
    "alibaba chatbot chatbots gpt ai artificial intelligence cutoff finetuning finetuned"
)
_REFUSAL = frozenset(_REFUSAL_TEXT.split())
_SUFFIX_TEXT = (
    "ational ization isation fulness ousness iveness tional ically ations ation ities ments ment ingly "
    "edly ness less able ible ance ence ical ists ist isms ism ings ing ions ion ies ied ive ous ity "
    "als al ers er ors or ed es ly s y e"
)
_SUFFIXES = _SUFFIX_TEXT.split()


@functools.lru_cache(maxsize=2**16)
def stem(word: str) -> str:
    """The word without one common English suffix, at least three letters long."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word[: len(word) - len(suffix)]
    return word


def content_words(text: str) -> list[str]:
    """The normalised words of a text that are no function words (all words if there are no others)."""
    words = normalise(text).split()
    return [word for word in words if word not in STOP_WORDS] or words


def _prf(label: Counter[str], answer: Counter[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 of a bag against the label's bag."""
    common = (label & answer).total()
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / answer.total(), common / label.total()
    return precision, recall, 2 * precision * recall / (precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def _names(text: str) -> Counter[str]:
    """Capitalised words that do not begin a sentence, and words with capitals inside."""
    found = re.findall(r"(?<=[\w,;:’'\")\]] )[A-Z][\w’'-]*|\b\w+[A-Z]\w*", text)
    return Counter(normalise(word) for word in found)


def _numbers(text: str) -> Counter[str]:
    return Counter(number.replace(",", "") for number in re.findall(r"\d[\d,.]*\d|\d", text))


def _longest_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest run of words that both have."""
    best, row = 0, [0] * (len(b) + 1)
    for word in a:
        previous = 0
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], previous + 1 if word == other else 0
            best = max(best, row[j])
    return best


def _near(words: Sequence[str], others: Sequence[str]) -> tuple[float, float]:
    """Mean and least, over `words`, of the best spelling similarity to one of `others`."""
    if not words or not others:
        return 0.0, 0.0
    best = [max(distance.JaroWinkler.similarity(w, o) for o in others) for w in words]
    return sum(best) / len(best), min(best)


@functools.lru_cache(maxsize=2**14)
def spelling_features(label: str, answer: str) -> dict[str, float]:
    """Named features of the two spellings; see the module's docstring."""
    answer = answer[:MAX_CHARS]
    a, b = normalise(label), normalise(answer)
    words_a, words_b = a.split(), b.split()
    content_a, content_b = content_words(label), content_words(answer)
    short_b = list(dict.fromkeys(content_b))[:60]
    stems_a, stems_b = [stem(w) for w in content_a], [stem(w) for w in content_b]
    found: dict[str, float] = {
        "same": float(a == b),
        "same_stems": float(stems_a == stems_b),
        "same_bag": float(Counter(stems_a) == Counter(stems_b)),
        "label_in_answer": float(f" {a} " in f" {b} "),
        "answer_in_label": float(bool(b) and f" {b} " in f" {a} "),
        "ratio": fuzz.ratio(a, b),
        "partial_ratio": fuzz.partial_ratio(a, b),
        "token_sort_ratio": fuzz.token_sort_ratio(a, b),
        "token_set_ratio": fuzz.token_set_ratio(" ".join(stems_a), " ".join(stems_b)),
        "partial_token_sort": fuzz.partial_token_sort_ratio(a, b),
        "jaro_winkler": distance.JaroWinkler.similarity(a, b),
        "subsequence": distance.LCSseq.normalized_similarity(a, b),
        "prefix": distance.Prefix.normalized_similarity(a, b),
        "postfix": distance.Postfix.normalized_similarity(a, b),
        "log_words_label": math.log1p(len(words_a)),
        "log_words_answer": math.log1p(len(words_b)),
        "content_ratio": math.log((1 + len(content_b)) / (1 + len(content_a))),
        "lines": float(answer.strip().count("\n")),
        "refusal": sum(w in _REFUSAL for w in content_b) / max(1, len(content_b)),
        "refusal_label": sum(w in _REFUSAL for w in content_a) / max(1, len(content_a)),
        "lower_case": float(answer == answer.lower()),
        "same_first": float(stems_a[:1] == stems_b[:1]),
        "same_last": float(stems_a[-1:] == stems_b[-1:]),
        "run": _longest_run(stems_a, stems_b[:80]) / max(1, len(stems_a)),
        "label_named": float(bool(_names(label))),
        "longest_shared": float(max(map(len, set(content_a) & set(content_b)), default=0)),
        "longest_missed": float(max(map(len, set(content_a) - set(content_b)), default=0)),
        "missed": float(len(set(stems_a) - set(stems_b))),
        "added": math.log1p(len(set(stems_b) - set(stems_a))),
    }
    bags = {
        "words": (Counter(words_a), Counter(words_b)),
        "stems": (Counter(stems_a), Counter(stems_b)),
        "heads": (Counter(w[:4] for w in content_a), Counter(w[:4] for w in content_b)),
        "pairs": (
            Counter(map(" ".join, zip(stems_a, stems_a[1:], strict=False))),
            Counter(map(" ".join, zip(stems_b, stems_b[1:], strict=False))),
        ),
        "names": (_names(label), _names(answer)),
        "numbers": (_numbers(label), _numbers(answer)),
    }
    for n in (2, 3, 4, 5):
        bags[f"chars{n}"] = (_grams(f" {a} ", n), _grams(f" {b} ", n))
    for name, (bag_a, bag_b) in bags.items():
        precision, recall, f1 = _prf(bag_a, bag_b)
        found |= {f"{name}_p": precision, f"{name}_r": recall, f"{name}_f": f1}
    found["near_label"], found["near_label_least"] = _near(content_a, short_b)
    found["near_answer"], found["near_answer_least"] = _near(short_b, content_a)
    found["initials"] = float(
        "".join(w[0] for w in words_a) == b.replace(" ", "")
        or "".join(w[0] for w in words_b) == a.replace(" ", "")
    )
    return found


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each row of `a` [N, D] with the same row of `b` (zero where one has no vector)."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), norms, out=np.zeros(len(a)), where=norms > 0)
