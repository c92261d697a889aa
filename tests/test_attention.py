"""Attention in half precision and by the TPU kernel (interpreted) has the outputs and gradients of plain float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.errors import DitError
from dit_jax.models.attention import attention
from dit_jax.models.shapes import NAMED_CONFIGS


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


# Lengths shorter than a block, one more than two blocks, and seven blocks: not all block sizes divide them.
@pytest.mark.parametrize("size", [5, 257, 890])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tpu_kernel_is_plain_attention(size, dtype, interpreted_splash):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, size, 4, 16), dtype)
    k, v = (jax.random.normal(key, (2, size, 2, 16), dtype) for key in keys[1:3])
    lengths = jnp.array([size, size - 2])
    # Padding belongs to no sample, and has no gradient.
    wanted = jax.random.normal(keys[3], q.shape)
    wanted = jnp.where((jnp.arange(size) < lengths[:, None])[..., None, None], wanted, 0)

    def run(impl):
        def loss(*arrays):
            y = attention(*arrays, lengths=lengths, impl=impl)
            return jnp.sum(y.astype(jnp.float32) * wanted), jnp.where(wanted == 0, 0, y)

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return y, *gradients

    tolerance = 1e-5 if dtype == "float32" else 0.06
    for one, two in zip(run("splash"), run("xla"), strict=True):
        assert one.dtype == two.dtype == jnp.dtype(dtype) and float(jnp.abs(two).max()) > 0.5
        one, two = (x.astype(jnp.float32) for x in (one, two))
        np.testing.assert_allclose(one, two, atol=tolerance, rtol=tolerance)


def test_an_implementation_of_another_platform_is_refused():
    shape = NAMED_CONFIGS["qwen3-0.6b"]
    config = dataclasses.replace(shape, attention="splash")
    config.check_platform("tpu")
    with pytest.raises(DitError, match="attention 'splash' needs a TPU, but this is a GPU"):
        config.check_platform("gpu")
    shape.check_platform("cpu")
