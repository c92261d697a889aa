"""The tied head on a CPU against the plain product: values, both gradients, and under vmap and remat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models import head

VOCAB, SIZE = 8 * head.CHUNK + 37, 16  # the last chunk is a short one


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (3, 5, SIZE))
    embedding = jax.random.normal(keys[1], (VOCAB, SIZE)) / 4
    return hidden, embedding, jax.random.randint(keys[2], (3, 5), 0, VOCAB)


def plain(hidden, embedding):
    return hidden @ embedding.T


def loss(logits, hidden, embedding, target):
    logp = jax.nn.log_softmax(logits(hidden, embedding), axis=-1)
    return -jnp.take_along_axis(logp, target[..., None], axis=-1).sum()


def test_logits_and_both_gradients_are_those_of_the_plain_product(arrays):
    hidden, embedding, target = arrays
    np.testing.assert_allclose(
        head.tied_logits(hidden, embedding), plain(hidden, embedding), atol=1e-5
    )
    grads = [
        jax.jit(jax.grad(lambda h, e, f=f: loss(f, h, e, target), argnums=(0, 1)))(
            hidden, embedding
        )
        for f in (head.tied_logits, plain)
    ]
    for one, two in zip(*grads, strict=True):
        assert float(jnp.abs(two).max()) > 0.1
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_under_vmap_and_remat(arrays):
    hidden, embedding, target = arrays

    def grads(logits):
        one = jax.checkpoint(lambda h, t: loss(logits, h, embedding, t))
        return jax.jit(jax.vmap(jax.grad(one)))(hidden, target)

    np.testing.assert_allclose(grads(head.tied_logits), grads(plain), atol=2e-5)


def test_chosen_for_a_large_vocabulary_on_one_device_only():
    assert head.prefers_chunks(151936)
    assert not head.prefers_chunks(2730)
    types = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("tensor",), types, devices=jax.devices()[:2])):
        assert not head.prefers_chunks(151936)
