"""Models and sizes of a benchmark: shapes by name, presets by suite and machine."""

import dataclasses
import pathlib
import re

from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.families import read_config
from dit_jax.models.shapes import NAMED_CONFIGS

SUITES = ("diffs", "train", "ask", "corpus")
TINY_FOLDER = pathlib.Path(__file__).parent.parent / "dit_jax" / "assets" / "tiny_qwen3"

# Sizes, which --diffs, --steps, … override. "world": a batch of the quickstart. "tiny": its model on random tokens.
# "slice": a few layers of a released shape on a CPU. "small": all of a small one, see configs/real.py. "full": a
# released shape on an accelerator (the paper's recipe: diffs of rank 1 in steps of 2 questions x 3 kinds of samples, an
# adapter of rank 16 in batches of 8).
PRESETS: dict[tuple[str, str], dict[str, int]] = {
    ("diffs", "world"): dict(
        diffs=50, batch=50, steps=72, samples=3, num_ce=1, length=35, scored=15, repeats=3
    ),
    ("diffs", "tiny"): dict(diffs=48, batch=48, steps=8, samples=5, num_ce=2, length=36, scored=16),
    ("diffs", "slice"): dict(diffs=4, batch=4, steps=2, samples=3, num_ce=1, length=48, scored=16),
    ("diffs", "small"): dict(diffs=8, batch=8, steps=2, samples=3, num_ce=1, length=40, scored=16),
    ("diffs", "full"): dict(
        diffs=32, batch=16, steps=4, samples=6, num_ce=2, length=256, scored=128
    ),
    ("train", "tiny"): dict(diffs=64, batch=32, steps=24, length=32, scored=12),
    ("train", "slice"): dict(diffs=8, batch=8, steps=4, length=32, scored=8),
    ("train", "small"): dict(diffs=8, batch=8, steps=16, length=24, scored=10),
    ("train", "full"): dict(diffs=64, batch=8, steps=12, length=64, scored=16),
    ("ask", "tiny"): dict(diffs=100, batch=100, length=24, new_tokens=16),
    ("ask", "slice"): dict(diffs=32, batch=32, length=32, new_tokens=8),
    ("ask", "small"): dict(diffs=32, batch=32, length=32, new_tokens=8),
    ("ask", "full"): dict(diffs=100, batch=100, length=32, new_tokens=20),
    ("corpus", "tiny"): dict(diffs=128, batch=128, length=24, new_tokens=16),
    ("corpus", "slice"): dict(diffs=32, batch=32, length=32, new_tokens=8),
    ("corpus", "small"): dict(diffs=64, batch=64, length=32, new_tokens=16),
    ("corpus", "full"): dict(diffs=128, batch=128, length=32, new_tokens=24),
}


def shape(name: str) -> DecoderConfig:
    """The architecture called NAME or NAME-Nlayers, e.g. "tiny", "qwen3-4b", "qwen3-0.6b-4layers".

    Raises:
        DitError: no such shape.
    """
    match = re.fullmatch(r"(?P<base>.+?)(-(?P<layers>\d+)layers)?", name)
    base, layers = match["base"], match["layers"]
    if base == "tiny":
        config = read_config(TINY_FOLDER)
    elif base in NAMED_CONFIGS:
        config = NAMED_CONFIGS[base]
    else:
        known = ", ".join(("tiny", *NAMED_CONFIGS))
        raise DitError(f"unknown model {name!r}: choose from {known}, with -Nlayers for a slice")
    if layers is None:
        return config
    if not 0 < int(layers) <= config.num_hidden_layers:
        raise DitError(f"{name!r}: {base} has {config.num_hidden_layers} layers")
    types = config.layer_types[: int(layers)]
    return dataclasses.replace(config, num_hidden_layers=int(layers), layer_types=types)


def is_shallow(name: str) -> bool:
    """Whether the model is small: unrolled, its layers run faster than scanned and still compile quickly."""
    return name.startswith(("tiny", "smollm2-135m")) or name.endswith("layers")


def preset(suite: str, model: str, platform: str, tokens: str = "random") -> dict[str, int]:
    """Default sizes of a suite: the embedded world's, a slice's, a small model's, or those on an accelerator.

    Raises:
        DitError: tokens of the embedded world for another suite or model.
    """
    if tokens == "world":
        if suite != "diffs" or not model.startswith("tiny"):
            raise DitError("--tokens world is for --suite diffs --model tiny")
        return PRESETS["diffs", "world"]
    on_cpu = "slice" if model.endswith("layers") else "small"
    kind = "tiny" if model.startswith("tiny") else on_cpu if platform == "cpu" else "full"
    return PRESETS[suite, kind]
