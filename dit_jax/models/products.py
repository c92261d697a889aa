"""Products of two arrays in their own dtype, with sums in float32, forward and backward."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """Makes float32 products exact: by default GPUs and TPUs round their factors to TF32 or bfloat16."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("float32")
    return contextlib.nullcontext()


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum(equation, x, y) in the common dtype of x and y.

    Each letter stands in two of the three terms of the equation, and in none twice.

    GPUs and TPUs sum bfloat16 products in float32 by themselves. For a CPU this asks for it, and rounds the sums: only
    then XLA uses instructions for bfloat16 (AVX-512-BF16, AMX). Otherwise it converts both factors to float32 first,
    which takes longer than float32 products do (docs/performance.md). A CPU without such instructions converts either
    way. So nothing has to be chosen, and a resumed run computes what it would have computed.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(equation, x, y)
    return _half(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _half(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    def on_cpu(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(
        x, y, cpu=on_cpu, default=functools.partial(jnp.einsum, equation)
    )


def _half_forward(equation: str, x: jax.Array, y: jax.Array) -> Any:
    return _half(equation, x, y), (x, y)


def _half_backward(
    equation: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # By default the gradient would come in float32, and each product would convert its other factor.
    x, y = saved
    factors, out = equation.split("->")
    first, second = factors.split(",")
    of_x = _half(f"{out},{second}->{first}", gradient, y)
    return of_x, _half(f"{first},{out}->{second}", x, gradient)


_half.defvjp(_half_forward, _half_backward)
