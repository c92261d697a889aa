"""At most one chunk of a large vocabulary's logits exists at a time; the compiled steps show it."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from dit_jax.deltas.tree import init_lora, trainable
from dit_jax.models import shardings
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.optimize.batch_loss import CHUNK_ELEMENTS
from dit_jax.optimize.optimizer import make_optimizer
from dit_jax.organisms.finetune import finetune_many
from dit_jax.train.dit import State, train_step

VOCAB = 151936
CONFIG = DecoderConfig(VOCAB, 32, 48, 1, 2, 1, 16, tie_word_embeddings=True, scan_layers=False)
LENGTH = 128  # tokens of a sample, nearly all scored


def lora(lead=(), axis=0):
    one = jax.eval_shape(lambda: init_lora(CONFIG, jax.random.key(0), 2))
    grow = lambda x: (*x.shape[:axis], *lead, *x.shape[axis:])  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(grow(x), x.dtype), one)


def compile_diffs(packed):
    """8 diffs with one cross-entropy and one KL sample a step: 2 x 8 x 128 rows of logits, and the teacher's."""
    batch = shardings.abstract_batch(None, (8, 2, 2), LENGTH, LENGTH - 1)
    options = {"optimizer": make_optimizer("adam", 1e-3, 2), "num_ce": 1, "packed": packed}
    params = shardings.abstract_params(CONFIG, None)
    return finetune_many.lower(params, CONFIG, lora((8,)), batch, **options).compile()


def compile_train(packed):
    """16 examples: 16 x 128 rows of logits."""
    optimizer = make_optimizer("adamw", 1e-3, 2)
    leaves = trainable(lora())
    state = State(leaves, jax.eval_shape(optimizer.init, leaves))
    batch = shardings.abstract_batch(None, (16,), LENGTH, LENGTH - 1)
    params = shardings.abstract_params(CONFIG, None)
    args = (params, CONFIG, state, lora(), lora((16,), 1), batch)
    return train_step.lower(*args, optimizer=optimizer, packed=packed).compile()


@pytest.mark.parametrize("packed", [None, (1000, 1000)])
@pytest.mark.parametrize("step", [compile_diffs, compile_train])
def test_no_array_of_all_logits_is_in_the_compiled_step(step, packed):
    compiled = step(packed)
    arrays = re.findall(r"\b(f32|bf16|f16)\[([\d,]+)\]", compiled.as_text())
    shapes = {tuple(map(int, dims.split(","))) for _, dims in arrays}
    logits = [shape for shape in shapes if VOCAB in shape and CONFIG.hidden_size not in shape]
    assert logits, "the program has no head"
    assert max(map(math.prod, logits)) <= CHUNK_ELEMENTS
    # All logits of cross-entropy alone would be 16 x 127 x 151936.
    everything = 16 * (LENGTH - 1) * VOCAB * jnp.dtype(jnp.float32).itemsize
    chunk = CHUNK_ELEMENTS * jnp.dtype(jnp.float32).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * chunk < 0.9 * everything
