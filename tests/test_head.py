"""The head against the plain product and its gradient, tied and untied, also for a large vocabulary on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models import head
from dit_jax.models.decoder_config import DecoderConfig

LARGE = 8 * head.CHUNK + 37  # the last chunk is a short one
ROWS, SIZE = 6, 16


def config_of(vocab, tied):
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=SIZE,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )


def case(vocab, tied):
    keys = jax.random.split(jax.random.key(0), 4)
    table = jax.random.normal(keys[0], (vocab, SIZE)) / 4
    change = jax.random.normal(keys[1], (vocab, SIZE)) / 4
    hidden = jax.random.normal(keys[2], (ROWS, SIZE))
    gradient = jax.random.normal(keys[3], (ROWS, vocab))
    if tied:
        params = {"embed_tokens": {"embedding": table}}
        deltas = ({"embed_tokens": {"w": change}},)
    else:
        params, deltas = {"lm_head": {"kernel": table.T}}, ({"lm_head": {"w": change.T}},)
    return params, deltas, table, table + change, hidden, gradient


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [LARGE, 8 * head.CHUNK, 300])
def test_logits_and_gradient_are_those_of_the_plain_product(vocab, tied):
    config = config_of(vocab, tied)
    params, deltas, table, changed, hidden, gradient = case(vocab, tied)
    for given, expected in (((), table), (deltas, changed)):

        @jax.jit
        def both(hidden, gradient, given=given):
            weight = head.head_weight(params, config, given)

            def columns(first, count):
                return jax.lax.dynamic_slice_in_dim(gradient, first, count, axis=1)

            return head.logits(config, weight, hidden), head.to_hidden(config, weight, columns)

        logits, back = both(hidden, gradient)
        np.testing.assert_allclose(logits, hidden @ expected.T, atol=1e-5)
        assert float(jnp.abs(back).max()) > 10
        np.testing.assert_allclose(back, gradient @ expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_products_have_float32_results():
    config = dataclasses.replace(config_of(300, True), dtype="bfloat16")
    params, _, table, _, hidden, gradient = case(300, True)
    weight = head.head_weight(params, config)
    assert weight.dtype == jnp.bfloat16
    logits = head.logits(config, weight, hidden)
    back = head.to_hidden(config, weight, lambda first, count: gradient[:, first : first + count])
    assert logits.dtype == back.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden @ table.T, atol=0.05)
    np.testing.assert_allclose(back, gradient @ table, atol=0.5)


def test_chosen_for_a_large_vocabulary_on_one_device_only():
    assert head.prefers_chunks(151936)
    assert not head.prefers_chunks(2730)
    types = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), types, devices=jax.devices()[:2])):
        assert not head.prefers_chunks(151936)
