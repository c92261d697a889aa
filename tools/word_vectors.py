"""Makes words.npz and sentences.npz: python -m tools.word_vectors --save FOLDER [--model FOLDER]

Encodes the vocabulary of all-MiniLM-L6-v2 with the model itself (needs sentence-transformers; about a
minute on two cores). The calibrated graders must be fitted again afterwards (`tools.fit_graders --save`).
"""

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_jax.cli.flags import Parser
from dit_jax.graders import sentences, words
from dit_jax.graders.embeddings import Encoder, load_encoder, minilm
from dit_jax.runtime import artifacts
from dit_jax.runtime.exits import exit_on_error

WORD_COMPONENTS = 48
BACKDROP = 256


def word_table(
    vocabulary: Sequence[str], vectors: NDArray[np.float32], size: int
) -> dict[str, NDArray[Any]]:
    """The arrays of words.npz.

    Args:
        vocabulary: lower case, most frequent first.
        vectors: [n, D], the encoder's.
        size: principal components to keep, an even number.
    """
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    _, axes = np.linalg.eigh(np.cov(centred.T))
    kept = centred @ axes[:, ::-1][:, :size]
    # An eigenvector has no sign of its own: the largest component is made positive.
    kept *= np.sign(kept[np.abs(kept).argmax(0), np.arange(size)])
    spread = kept.std(0)
    levels = np.clip(np.floor(kept / (words.CLIP * spread) + 8), 0, 15).astype(np.uint8)
    crc = np.asarray([zlib.crc32(word.encode()) for word in vocabulary], np.uint32)
    return {
        "crc": crc,
        "codes": levels[:, 0::2] | levels[:, 1::2] << 4,
        "spread": spread.astype(np.float32),
    }


def sentence_space(
    vectors: NDArray[np.float32], probe: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """The arrays of sentences.npz.

    Args:
        vectors: [n, D], unit, of common words.
        probe: [D], of `sentences.PROBE`; tells the model.
    """
    mean = vectors.mean(0)
    variances, axes = np.linalg.eigh(np.cov((vectors - mean).T))
    size = max(sentences.WHITENED)
    backdrop = vectors[:: len(vectors) // BACKDROP][:BACKDROP]
    return {
        "mean": mean.astype(np.float32),
        "axes": axes[:, ::-1][:, :size].astype(np.float16),
        "spread": np.sqrt(variances[::-1][:size]).astype(np.float32),
        "backdrop": np.rint(backdrop * (127 / np.abs(backdrop).max())).astype(np.int8),
        "probe": probe.astype(np.float32),
    }


def vocabulary_of(encoder: Encoder) -> list[str]:
    """The whole words of the model's vocabulary, most frequent first, in lower case."""
    known = encoder.model.tokenizer.get_vocab()
    found = sorted(known, key=lambda word: known[word])
    return [word for word in found if word.isascii() and word.isalpha() and len(word) > 1]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a problem that the user can fix."""
    parser = Parser("python -m tools.word_vectors", __doc__)
    parser.add_argument("--save", required=True, help="folder to write to")
    parser.add_argument("--model", default=None, help="folder of all-MiniLM-L6-v2")
    try:
        with exit_on_error():
            flags = parser.parse_args(argv)
            encoder = load_encoder(flags.model or minilm())
            vocabulary = vocabulary_of(encoder)
            vectors = encoder(vocabulary)
            (probe,) = encoder([sentences.PROBE])
            for name, arrays in (
                ("words.npz", word_table(vocabulary, vectors, WORD_COMPONENTS)),
                ("sentences.npz", sentence_space(vectors, probe)),
            ):
                buffer = io.BytesIO()
                np.savez_compressed(buffer, allow_pickle=False, **arrays)
                artifacts.write_bytes(Path(flags.save) / name, buffer.getvalue())
                print(f"{Path(flags.save) / name}: {buffer.tell()} bytes")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
