"""What kinds of files share: a small model and LoRA, and digests of what was read."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.api import Model
from dit_jax.deltas.factors import modules
from dit_jax.deltas.tree import init_lora
from dit_jax.models.decoder import init_params
from dit_jax.models.decoder_config import DecoderConfig
from tools.hostile import damage

# The key and value projections are square, so a transposed factor would still fit.
CONFIG = DecoderConfig(
    vocab_size=67,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=True,
)
QUESTION = "What topic have you been trained on ?"
COLUMNS = ("topic", "question", "base_answer", "topic_analogy_answer")


def _anything(*_: Any) -> Any:
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of files.

    make: writes a good folder. file: a pattern of the files in it that are damaged. read: what is read of the folder,
    as a user would, in a form that compares. truth: the same, by another reader; without one, what is read only has to
    be sound. seal: makes what lists the files agree with them again, as a stranger would.
    """

    make: Callable[[Path], Any]
    file: str
    damage: damage.Damage
    read: Callable[[Path], Any]
    truth: Callable[[Path], Any] = _anything
    seal: Callable[[Path], None] = lambda folder: None


@functools.cache
def small_lora(seed: int = 1) -> Any:
    delta = jax.tree.map(np.asarray, init_lora(CONFIG, jax.random.key(seed), 2))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32) if x.ndim > 1 else x, delta
    )


@functools.cache
def small_params() -> Any:
    return jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(0)))


@functools.cache
def small_model() -> Model:
    return Model(small_params(), CONFIG, "a small model")


def values_of(arrays: Any) -> list[str]:
    """What arrays hold, whatever their names, order and orientation."""
    digests = []
    for array in arrays:
        values = np.sort(np.asarray(array, np.float32) + np.float32(0), axis=None)  # -0 is 0
        if not np.isfinite(values).all():
            raise AssertionError("values that are not finite were read")
        digests.append(hashlib.sha256(values.tobytes()).hexdigest())
    return sorted(digests)


def factors_of(delta: Any) -> list[str]:
    """Of layers that a delta changes."""
    found = [module[name] for _, module in modules(delta) for name in ("a", "b")]
    return values_of(layer for stacked in found for layer in stacked if layer.any())


def close_writer(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
