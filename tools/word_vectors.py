"""Makes words.npz and sentences.npz: python -m tools.word_vectors --save FOLDER [--model FOLDER]

Encodes the vocabulary of all-MiniLM-L6-v2 with the model itself (needs sentence-transformers; about a
minute on two cores). The calibrated graders must be fitted again afterwards (`calibrate --save`).
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dit_jax.errors import Parser, exit_on_error
from dit_jax.graders import sentences, words
from dit_jax.graders.embeddings import load_encoder, minilm
from dit_jax.runtime import artifacts

WORD_COMPONENTS = 48


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a problem that the user can fix."""
    parser = Parser(prog="python -m tools.word_vectors", description=__doc__)
    parser.add_argument("--save", required=True, help="folder to write to")
    parser.add_argument("--model", default=None, help="folder of all-MiniLM-L6-v2")
    try:
        with exit_on_error():
            flags = parser.parse_args(argv)
            encoder = load_encoder(flags.model or minilm())
            vocabulary = encoder.vocabulary()
            vectors = encoder(vocabulary)
            (probe,) = encoder([sentences.PROBE])
            for name, arrays in (
                ("words.npz", words.make(vocabulary, vectors, WORD_COMPONENTS)),
                ("sentences.npz", sentences.make(vectors, probe)),
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
