"""Offline graders on the scale of an LLM judge: trees and a linear model over features of both texts.

They were fitted to published grades (docs/grading.md says how well they agree) and come as arrays of
numbers (`assets/graders/`), which `python -m tools.fit_graders` makes.

The trees are the arrays `root` [trees] int32, first node of each tree; `weight` [trees] float32, what its value is
multiplied by; `base` [1] float64, added to the sum; and per node `feature` int16 (-1 at a leaf), `value` float32 (the
threshold, or at a leaf the tree's value), `skip` uint16. The left child of a node is the next one, the right child is
`skip` nodes on: rows go left where feature <= threshold.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_jax.data.labels import normalise
from dit_jax.errors import DitError
from dit_jax.graders.embeddings import check_installed, minilm
from dit_jax.graders.features import spelling_features
from dit_jax.graders.grades import Grade, Grader, Item
from dit_jax.graders.sentences import load_minilm, sentence_features
from dit_jax.graders.words import read_asset, word_features

KINDS = ("topics", "news")
MIDDLE = 2.5  # predictions are stretched away from it
NEWS_WORDS = 8  # labels of as many words are sentences: headlines, not topics
Arrays = Mapping[str, NDArray[Any]]
Pairs = Sequence[tuple[str, str]]


def feature_matrix(pairs: Pairs, encoder: Any = None) -> tuple[NDArray[np.float32], list[str]]:
    """Features [N, F] of (label, answer) pairs and their names.

    Args:
        encoder: an `embeddings.Encoder` of MiniLM, for features of its sentence vectors; None for
            those of the word vectors that come with dit_jax.
    """
    spelling = [spelling_features(label, answer) for label, answer in pairs]
    columns: dict[str, Any] = {n: [row[n] for row in spelling] for n in spelling[0]}
    # Sentence vectors know what the word vectors know: with both, the graders measured the same.
    columns |= word_features(pairs) if encoder is None else sentence_features(pairs, encoder)
    return np.stack(list(columns.values()), 1).astype(np.float32), list(columns)


def evaluate_trees(model: Arrays, x: NDArray[np.floating]) -> NDArray[np.float64]:
    """The trees' sum [N] for rows x [N, F]; features are compared as float32, as in training."""
    x = np.asarray(x, np.float32)
    feature, value = model["feature"], model["value"]
    skip = model["skip"].astype(np.int64)
    node = np.broadcast_to(model["root"].astype(np.int64), (len(x), len(model["root"]))).copy()
    rows = np.arange(len(x))[:, None]
    while (inner := feature[node] >= 0).any():
        left = x[rows, np.maximum(feature[node], 0)] <= value[node]
        node = np.where(inner, node + np.where(left, 1, skip[node]), node)
    return model["base"][0] + value[node].astype(np.float64) @ model["weight"].astype(np.float64)


def predict(model: Arrays, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Grades [N] on the continuous scale: a weighted mean of the trees and the linear model."""
    z = np.clip((x - model["mean"]) / model["scale"], -5, 5)
    linear = model["intercept"][0] + z.astype(np.float64) @ model["coef"].astype(np.float64)
    share, stretch = float(model["share"][0]), float(model["stretch"][0])
    value = (1 - share) * evaluate_trees(model, x) + share * linear
    return np.clip(MIDDLE + stretch * (value - MIDDLE), 1, 5)


def settle(values: NDArray[np.float64], pairs: Pairs) -> NDArray[np.float64]:
    """The cases that need no model: an empty answer is a 1, the label itself a 5."""
    texts = [(normalise(label), normalise(answer)) for label, answer in pairs]
    empty = np.array([not answer for _, answer in texts])
    same = np.array([label == answer for label, answer in texts])
    return np.where(empty, 1.0, np.where(same, 5.0, values))


def names_digest(names: Sequence[str]) -> int:
    """Tells whether a model was fitted to these features in this order."""
    return zlib.crc32(" ".join(names).encode())


@functools.cache
def _asset(name: str) -> tuple[dict[str, dict[str, NDArray[Any]]], str]:
    """The models of an asset by kind, and its digest."""
    models: dict[str, dict[str, NDArray[Any]]] = {kind: {} for kind in KINDS}
    digest = 0
    for key, array in sorted(read_asset(name).items()):
        kind, part = key.split("/")
        models[kind][part] = array
        digest = zlib.crc32(np.ascontiguousarray(array).tobytes(), digest)
    return models, f"{digest:08x}"


class Calibrated(Grader):
    """Calibrated to published LLM grades, from spelling and the word vectors that come with dit_jax.

    Scores are whole grades; the raw value is the continuous prediction before rounding. An answer
    that is the label after `labels.normalise` is always a 5, an empty one a 1.

    Args:
        kind: "topics" (labels are names), "news" (labels are headlines), or "auto": by the length of
            each label.

    Raises:
        DitError: unknown kind, or a damaged asset.
    """

    name = "calibrated"
    about = "offline: predicts an LLM judge's grade from spelling and word vectors; kappa with it .88 to .91"
    asset = "calibrated.npz"

    def __init__(self, kind: str = "auto"):
        if kind not in (*KINDS, "auto"):
            known = ", ".join((*KINDS, "auto"))
            raise DitError(f"unknown kind {kind!r} of labels: choose from {known}")
        self.kind = kind
        self._models, digest = _asset(self.asset)
        self._encoder: Any = None
        self.settings = f"{digest} {kind}"

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        values = np.zeros(len(items))
        for kind in KINDS:
            members = [i for i, item in enumerate(items) if self._kind(item.label) == kind]
            pairs = [(items[i].label, items[i].answer or "") for i in members]
            values[members] = self.predict(pairs, kind) if members else []
        return [Grade(float(np.floor(v + 0.5)), f"{v:.3f}", self.name) for v in values]

    def predict(self, pairs: Pairs, kind: str) -> NDArray[np.float64]:
        """Continuous grades [N] in [1, 5] of pairs of one kind."""
        x, names = feature_matrix(pairs, self._encoder)
        model = self._models[kind]
        if int(model["names"][0]) != names_digest(names):
            raise DitError(f"'{self.asset}' was made for other features: run tools.fit_graders")
        return settle(predict(model, x), pairs)

    def _kind(self, label: str) -> str:
        if self.kind != "auto":
            return self.kind
        return "news" if len(label.split()) >= NEWS_WORDS else "topics"


class CalibratedEmbeddings(Calibrated):
    """`Calibrated` with MiniLM's sentence vectors instead of word vectors (needs sentence-transformers).

    Args:
        kind: see `Calibrated`.
        model: a folder of all-MiniLM-L6-v2, for which it was calibrated; default: where it is found.
    """

    name = "calibrated_embeddings"
    about = "offline: predicts an LLM judge's grade from sentence vectors; kappa with it .91 to .93"
    needs = "sentence-transformers and all-MiniLM-L6-v2"
    asset = "calibrated_embeddings.npz"

    @classmethod
    def check(cls, **options: Any) -> None:
        check_installed()

    def __init__(self, kind: str = "auto", model: str | None = None):
        super().__init__(kind)
        self._encoder = load_minilm(model or minilm())
