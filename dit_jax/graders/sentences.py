"""Features of MiniLM's sentence and token vectors, for the grader `calibrated_embeddings`.

The asset (`assets/graders/sentences.npz`) holds what is known of the encoder's space: mean and leading
principal axes of its vectors of common words, and some of these vectors as a backdrop, against which
texts that are near to everything can be told.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_jax.errors import DitError
from dit_jax.graders.embeddings import Encoder, load_encoder
from dit_jax.graders.features import cosines
from dit_jax.graders.words import read_asset

PHRASES = ("The topic is {}.", "I want to talk about {}.")
PHRASE_CHARS = 300  # of a text that is put into a phrase
TOKEN_CHARS = 600  # of a text whose tokens are aligned
WHITENED = (32, 96)
ANSWER_COMPONENTS = 24
_NEAREST = 4  # of the backdrop
PROBE = "science"
_SAME_MODEL = 0.99


@functools.cache
def _space() -> dict[str, NDArray[np.float32]]:
    arrays = read_asset("sentences.npz")
    backdrop = arrays["backdrop"].astype(np.float32)
    return {
        "mean": arrays["mean"].astype(np.float32),
        "axes": arrays["axes"].astype(np.float32),
        "spread": arrays["spread"].astype(np.float32),
        "backdrop": backdrop / np.linalg.norm(backdrop, axis=1, keepdims=True),
        "probe": arrays["probe"].astype(np.float32),
    }


def load_minilm(model: str) -> Encoder:
    """The encoder, checked to be the one that the calibration was made with.

    Raises:
        DitError: it cannot be had (see `embeddings.load_encoder`), or it is another model.
    """
    encoder = load_encoder(model)
    (vector,), probe = encoder([PROBE]), _space()["probe"]
    if vector.shape != probe.shape or float(vector @ probe) < _SAME_MODEL:
        raise DitError(
            f"{model!r} is not all-MiniLM-L6-v2, which 'calibrated_embeddings' was calibrated for: "
            "use the grader 'embeddings' for other models"
        )
    return encoder


def sentence_features(
    pairs: Sequence[tuple[str, str]], encoder: Encoder
) -> dict[str, NDArray[np.float64]]:
    """Named columns [N] about the meanings of (label, answer) pairs as whole texts."""
    space = _space()
    texts = list(dict.fromkeys(text for pair in pairs for text in pair))
    place = {text: i for i, text in enumerate(texts)}
    ia = np.array([place[label] for label, _ in pairs])
    ib = np.array([place[answer] for _, answer in pairs])
    vectors = encoder(texts)
    centred = vectors - space["mean"]
    found: dict[str, NDArray[Any]] = {
        "sentence_cosine": cosines(vectors[ia], vectors[ib]),
        "sentence_centred": cosines(centred[ia], centred[ib]),
    }
    components = centred @ space["axes"]
    for n in WHITENED:
        white = components[:, :n] / space["spread"][:n]
        found[f"sentence_whitened{n}"] = cosines(white[ia], white[ib])
    for i, phrase in enumerate(PHRASES):
        put = encoder([phrase.format(text[:PHRASE_CHARS].strip().rstrip(".")) for text in texts])
        found[f"sentence_phrase{i}"] = cosines(put[ia], put[ib])
    near = np.sort(vectors @ space["backdrop"].T, axis=1)
    nearest, usual = near[:, -_NEAREST:].mean(1), near.mean(1)
    found |= {
        "sentence_nearest_label": nearest[ia],
        "sentence_nearest_answer": nearest[ib],
        "sentence_usual_label": usual[ia],
        "sentence_usual_answer": usual[ib],
        "sentence_local": 2 * found["sentence_cosine"] - nearest[ia] - nearest[ib],
    }
    tokens = encoder.tokens([text[:TOKEN_CHARS] for text in texts])
    aligned = np.array([_align(tokens[i], tokens[j]) for i, j in zip(ia, ib, strict=True)])
    for i, name in enumerate(("recall", "recall_least", "precision", "precision_least")):
        found[f"token_{name}"] = aligned[:, i]
    found |= {f"sentence_answer{i}": components[ib, i] for i in range(ANSWER_COMPONENTS)}
    return found


def _align(a: NDArray[np.float32], b: NDArray[np.float32]) -> tuple[float, float, float, float]:
    """Mean and least best cosine of each of a's tokens among b's, and the other way around."""
    near = a @ b.T
    best_a, best_b = near.max(1), near.max(0)
    return float(best_a.mean()), float(best_a.min()), float(best_b.mean()), float(best_b.min())
