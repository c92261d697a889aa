"""Gradients of attention in half precision: those of float32 within rounding, in the dtype of their arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models.attention import attention


def test_half_precision_has_the_gradients_of_float32():
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 7, 4, 8))
    k, v = (jax.random.normal(key, (2, 7, 2, 8)) for key in keys[1:3])
    wanted = jax.random.normal(keys[3], q.shape)
    lengths = jnp.array([7, 4])

    def loss(*arrays):
        return jnp.sum(attention(*arrays, lengths=lengths).astype(jnp.float32) * wanted)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    half = gradient(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    for one, two in zip(half, gradient(q, k, v), strict=True):
        assert one.dtype == jnp.bfloat16 and float(jnp.abs(two).max()) > 0.5
        np.testing.assert_allclose(one.astype(jnp.float32), two, atol=0.06, rtol=0.05)
