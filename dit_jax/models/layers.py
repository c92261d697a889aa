"""Layers as Flax Linen modules that take deltas as an argument.

Einsum letters: B batch, T length, D d_model, N heads, K kv heads, H head_dim, F ffn, L layers, R rank, V vocab. In a
projection D stands for its inputs and F for its outputs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, Deltas
from dit_jax.models.modules import Module
from dit_jax.models.products import precision, product
from dit_jax.runtime.parallel import FREE, constrain

# The name of what remat "dots" keeps: the outputs of `Linear`, and of a LoRA's first factor.
PROJECTION = "projection"


class Lora(NamedTuple):
    """LoRA factors in the form that layers take (`ready`), in the compute dtype. With scale [B]: one per example."""

    a: jax.Array
    b: jax.Array
    scale: jax.Array | None


def pick(deltas: Deltas, name: str) -> tuple[Delta, ...]:
    """The parts of the deltas for the sub-module `name`, without deltas that do not change it."""
    return tuple(delta[name] for delta in deltas if name in delta)


def ready(deltas: Deltas, dtype: Any) -> Deltas:
    """Stacked deltas in the form that layers take: each LoRA is a `Lora`, and a shared one has its scale inside `b`.

    This converts the stacked factors of all layers at once: in every layer it would be dozens of kernels more, and in a
    decoding loop again for each token.
    """

    def one(node: Any) -> Any:
        if "a" in node:
            a, b, scale = node["a"], node["b"], node["scale"]
            # One per example keeps its scale: folded in, a TPU's compiler makes a fusion that it cannot place.
            if a.ndim == 4:  # [L, B, in, R]
                return Lora(a.astype(dtype), b.astype(dtype), scale.astype(dtype))
            return Lora(a.astype(dtype), (b * scale[..., None, None]).astype(dtype), None)
        return {name: one(x) if isinstance(x, Mapping) else x for name, x in node.items()}

    return tuple(one(delta) for delta in deltas)


class RMSNorm(nn.Module):
    """y = x / rms(x) * scale, computed in fp32 and returned in the dtype of x.

    With `unit_offset` (Gemma) it is (1 + scale), and that product is one in fp32 too.
    """

    epsilon: float
    param_dtype: Any
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, deltas: Deltas = ()) -> jax.Array:
        shape = (x.shape[-1],)
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale: jax.Array = self.param("scale", init, shape, self.param_dtype)
        for delta in deltas:
            scale = scale + delta["w"].astype(scale.dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        if self.unit_offset:
            return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        # The product with the scale is in the activation dtype, as in transformers.
        return scale.astype(x.dtype) * y.astype(x.dtype)


def make_norm(config: DecoderConfig, name: str) -> RMSNorm:
    """The norm of that name as this model computes it."""
    dtype = jnp.dtype(config.dtype)
    return RMSNorm(config.rms_norm_eps, dtype, config.unit_offset_norm, name=name)


class Linear(nn.Module):
    """y = x W + Σ_δ (dense: x w_δ; LoRA: scale · (x a) b), without ever forming W + δ for a LoRA.

    On a mesh W is gathered over fsdp here and split over tensor, into at most `module.units` pieces (heads).
    """

    module: Module
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, deltas: Deltas = ()) -> jax.Array:
        units, init = self.module.units, nn.initializers.normal(0.02)
        kernel: jax.Array = self.param("kernel", init, self.module.shape, self.dtype)
        for delta in deltas:
            if not isinstance(delta, Lora) and delta["w"].ndim == 2:
                kernel = kernel + delta["w"].astype(kernel.dtype)
        # The residual axis is never split here: each example, and each LoRA, needs all of it.
        inner, outer = (None if axis == "embed" else axis for axis in self.module.axes)
        y = _matmul(x, constrain(kernel.astype(self.dtype), inner, outer, units=units))
        for delta in deltas:
            if isinstance(delta, Lora):
                y = y + lora(x, delta, (inner, outer), units)
            elif delta["w"].ndim == 3:  # [B, in, out]: one for each example
                w = constrain(delta["w"].astype(self.dtype), FREE, inner, outer, units=units)
                y = y + product("BTD,BDF->BTF", x, w)
        return checkpoint_name(constrain(y, FREE, FREE, outer, units=units), PROJECTION)


class Bias(nn.Module):
    """y + b + Σ_δ w_δ, b [out] being the bias of a projection whose output y is."""

    module: Module
    dtype: Any

    @nn.compact
    def __call__(self, y: jax.Array, deltas: Deltas = ()) -> jax.Array:
        init, shape = nn.initializers.normal(0.02), self.module.shape
        bias: jax.Array = self.param("bias", init, shape, self.dtype)
        for delta in deltas:
            bias = bias + delta["w"].astype(bias.dtype)
        axes = (None if axis == "embed" else axis for axis in self.module.axes)
        return y + constrain(bias.astype(self.dtype), *axes, units=self.module.units)


def lora(x: jax.Array, delta: Lora, axes: tuple[str | None, str | None], units: int) -> jax.Array:
    """scale · (x a) b for one LoRA shared by the batch (a: [in, R]) or one per example (a: [B, in, R])."""
    a, b, scale = delta
    batch = (FREE,) * (a.ndim - 2)
    a = constrain(a, *batch, axes[0], None, units=units)
    b = constrain(b, *batch, None, axes[1], units=units)
    if scale is None:
        xa = checkpoint_name(_down(x.reshape(-1, x.shape[-1]), a), PROJECTION)
        return product("TR,RF->TF", xa, b).reshape(*x.shape[:-1], b.shape[-1])
    xa = checkpoint_name(_down(x, a) * scale[:, None, None], PROJECTION)
    return product("BTR,BRF->BTF", xa, b)


@jax.custom_vjp
def _down(x: jax.Array, a: jax.Array) -> jax.Array:
    """x a: [T, D] x [D, R], or the same with a batch in front."""
    batch = "B" * (x.ndim - 2)
    return product(f"{batch}TD,{batch}DR->{batch}TR", x, a)


def _down_forward(x: jax.Array, a: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _down(x, a), (x, a)


def _down_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, a = saved
    batch = "B" * (x.ndim - 2)
    # A custom rule does not inherit the precision of the forward pass.
    with precision(x.dtype):
        # [R, D] and then transposed is five times as fast on a CPU as [D, R], into which XLA would turn it.
        of_a = product(f"{batch}RT,{batch}TD->{batch}RD", gradient.mT, x)
        of_a = jax.lax.optimization_barrier(of_a).mT
        return product(f"{batch}TR,{batch}RD->{batch}TD", gradient, a.mT), of_a


_down.defvjp(_down_forward, _down_backward)


def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # One 2-D product: weight gradients of 3-D products are several times slower on a CPU.
    y = product("TD,DF->TF", x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])
