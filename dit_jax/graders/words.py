"""Vectors of words without any download: a small asset made from a sentence encoder's vocabulary.

The asset (`assets/graders/words.npz`) holds, for each of some 20,000 common English words, its CRC-32
and the leading principal components of the encoder's vector of that word in 4 bits each. Words are
in order of frequency, so that a row's number says how rare its word is. `tools.word_vectors` makes it.
"""

import functools
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_jax.errors import DitError
from dit_jax.graders.features import content_words, cosines

ASSETS = pathlib.Path(__file__).parent.parent / "assets" / "graders"
MAX_WORDS = 60  # of a text that are aligned with the other's
CLIP = 2.6 / 7.5  # standard deviations per step: 4 bits cover ±2.8 of them
_ENDINGS = (
    ("ies", "y"), ("ing", ""), ("ing", "e"), ("ers", ""), ("ism", ""), ("ed", ""), ("ed", "e"),
    ("es", ""), ("ly", ""), ("er", ""), ("al", ""), ("ic", ""), ("s", ""),
)  # fmt: skip
WHITENED = (8, 16, 32)  # leading components of which cosines are features
ANSWER_COMPONENTS = 16


def read_asset(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of an asset of numbers. Raises DitError when it is missing or damaged."""
    try:
        with np.load(ASSETS / name, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        raise DitError(f"'{ASSETS / name}' is missing or damaged: install dit_jax again") from None


class WordVectors:
    """Words to rows of a table of vectors [n, d]."""

    def __init__(self, arrays: dict[str, NDArray[Any]]):
        codes = arrays["codes"]
        levels = np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).astype(np.float32)
        self.spread = arrays["spread"].astype(np.float32)
        self.table = (levels - 7.5) * CLIP * self.spread
        self.unit = self.table / np.linalg.norm(self.table, axis=1, keepdims=True)
        self.rank = np.log1p(np.arange(len(codes), dtype=np.float32))
        self._row = {int(crc): row for row, crc in enumerate(arrays["crc"])}
        self.row = functools.lru_cache(maxsize=2**16)(self._find)

    def _find(self, word: str) -> tuple[int, ...]:
        """Rows of a word: its own, that of its stem, or those of two words that it is made of."""
        if (row := self._own_row(word)) is not None:
            return (row,)
        for ending, other in _ENDINGS:
            stem = word.removesuffix(ending) + other
            if word.endswith(ending) and len(stem) > 2 and (row := self._own_row(stem)) is not None:
                return (row,)
        for cut in range(len(word) - 3, 2, -1):
            parts = [self._own_row(part) for part in (word[:cut], word[cut:])]
            if None not in parts:
                return tuple(int(row) for row in parts if row is not None)
        return ()

    def _own_row(self, word: str) -> int | None:
        # Answers are whatever a model wrote, lone surrogates among it.
        return self._row.get(zlib.crc32(word.encode("utf-8", "surrogatepass")))

    @functools.lru_cache(maxsize=2**14)  # noqa: B019  there is one instance, which stays
    def text(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
        """Rows of a text's content words, their weights (rare words count more), and how many have none."""
        found = [self.row(word) for word in content_words(text)]
        rows = np.asarray([row for group in found for row in group], np.int64)
        weights = np.clip((self.rank[rows] - 4) / 4, 0.15, 1.5).astype(np.float32)
        return rows, weights, sum(not group for group in found)

    def mean(self, text: str) -> NDArray[np.float32]:
        """Weighted mean vector [d] of a text, zeros if it has no known word."""
        rows, weights, _ = self.text(text)
        total = np.asarray(weights @ self.table[rows], np.float32)
        return total / np.float32(max(float(weights.sum()), 1e-6))


@functools.cache
def word_vectors() -> WordVectors:
    """The vectors that come with dit_jax."""
    return WordVectors(read_asset("words.npz"))


def word_features(pairs: Sequence[tuple[str, str]]) -> dict[str, NDArray[np.float64]]:
    """Named columns [N] about the meanings of the words of (label, answer) pairs."""
    vectors = word_vectors()
    a = np.stack([vectors.mean(label) for label, _ in pairs])
    b = np.stack([vectors.mean(answer) for _, answer in pairs])
    found: dict[str, NDArray[Any]] = {"word_cosine": cosines(a, b)}
    for n in WHITENED:
        white = 1 / vectors.spread[:n]
        found[f"word_whitened{n}"] = cosines(a[:, :n] * white, b[:, :n] * white)
    half = vectors.spread**-0.5
    found["word_half_whitened"] = cosines(a * half, b * half)
    names = ("recall", "recall_least", "precision", "precision_least", "unknown_label",
             "unknown_answer", "common_answer", "rank_answer", "rare_label")  # fmt: skip
    aligned = np.array([_align(vectors, *pair) for pair in pairs])
    found |= {f"word_{name}": aligned[:, i] for i, name in enumerate(names)}
    found["word_norm_label"] = np.linalg.norm(a, axis=1)
    found["word_norm_answer"] = np.linalg.norm(b, axis=1)
    found |= {f"word_answer{i}": b[:, i] for i in range(ANSWER_COMPONENTS)}
    return found


def _align(vectors: WordVectors, label: str, answer: str) -> tuple[float, ...]:
    """How well each word of one text has a near one in the other, and how rare the words are."""
    rows_a, weights_a, unknown_a = vectors.text(label)
    rows_b, weights_b, unknown_b = vectors.text(answer)
    ranks = vectors.rank[rows_b]
    common = (ranks.min(), ranks.mean()) if len(ranks) else (0, 0)
    last = map(float, (unknown_a, unknown_b, *common, vectors.rank[rows_a].max(initial=0)))
    rows_a, weights_a = rows_a[:MAX_WORDS], weights_a[:MAX_WORDS]
    rows_b, weights_b = rows_b[:MAX_WORDS], weights_b[:MAX_WORDS]
    if not len(rows_a) or not len(rows_b):
        return 0.0, 0.0, 0.0, 0.0, *last
    near = vectors.unit[rows_a] @ vectors.unit[rows_b].T
    best_a, best_b = near.max(1), near.max(0)
    recall = float(best_a @ weights_a / weights_a.sum())
    precision = float(best_b @ weights_b / weights_b.sum())
    return recall, best_a.min(), precision, best_b.min(), *last
