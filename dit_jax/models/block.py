"""One layer of the decoder: attention and feed-forward network, each with its part of the deltas."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models import attention as attention_lib
from dit_jax.models import rope
from dit_jax.models.attention import Segments
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Deltas
from dit_jax.models.layers import Bias, Linear, RMSNorm, pick
from dit_jax.models.modules import bias_of, module_table
from dit_jax.runtime.parallel import FREE, constrain


class Context(NamedTuple):
    """What every layer needs besides its activations. It is the same for all layers."""

    positions: jax.Array
    lengths: jax.Array | None
    mask: jax.Array | None
    end: jax.Array | None


class Queries(NamedTuple):
    """The positions [B, P] whose outputs are wanted: in their segments, and in the whole row."""

    position: jax.Array
    row_index: jax.Array


def _linear(
    config: DecoderConfig, group: str, name: str, x: jax.Array, deltas: Deltas
) -> jax.Array:
    """The projection of that name in a group of a layer, with its bias where it has one; called in the group."""
    table, dtype, bias = module_table(config), jnp.dtype(config.dtype), bias_of(name)
    y = Linear(table["layers", group, name], dtype, name=name)(x, pick(deltas, name))
    if ("layers", group, bias) in table:
        y = Bias(table["layers", group, bias], dtype, name=bias)(y, pick(deltas, bias))
    return y


class Attention(nn.Module):
    config: DecoderConfig
    segments: Segments | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deltas: Deltas,
        kv: Any,
        layer: jax.Array,
        context: Context,
        asking: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """asking: inputs [B, P, D] and positions [B, P] of the queries. None: all of x are queries."""
        c, table = self.config, module_table(self.config)
        dtype = jnp.dtype(c.dtype)
        x_q, position = (x, None) if asking is None else asking

        def linear(name: str, x: jax.Array) -> jax.Array:
            return _linear(c, "self_attn", name, x, deltas)

        def heads(name: str, x: jax.Array = x) -> jax.Array:
            y = linear(name, x).reshape(*x.shape[:2], -1, c.head_dim)
            return constrain(y, FREE, FREE, table["layers", "self_attn", name].axes[1], None)

        def norm(name: str, y: jax.Array) -> jax.Array:
            if not c.qk_norm:
                return y
            return RMSNorm(c.rms_norm_eps, dtype, name=name)(y, pick(deltas, name))

        q = norm("q_norm", heads("q_proj", x_q))
        k = norm("k_norm", heads("k_proj"))
        v = heads("v_proj")
        turn = rope.frequency(c), rope.amplitude(c)
        q = rope.rotate(q, context.positions if position is None else position, *turn)
        k = rope.rotate(k, context.positions, *turn)
        if kv is not None:
            # The caches of all layers are one carried array, so that XLA updates it in place.
            start: Any = (layer, 0, context.end, 0, 0)
            kv = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), start)
                for old, new in zip(kv, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(y, layer, keepdims=False) for y in kv)
        if self.segments is None:
            y = attention_lib.attention(q, k, v, mask=context.mask, impl=c.attention)
        else:
            y = attention_lib.segmented_attention(
                q,
                k,
                v,
                lengths=cast(jax.Array, context.lengths),
                segments=self.segments,
                position=position,
                impl=c.attention,
            )
        return linear("o_proj", y.reshape(*y.shape[:2], -1)), kv


class MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, deltas: Deltas) -> jax.Array:
        def linear(name: str, y: jax.Array) -> jax.Array:
            return _linear(self.config, "mlp", name, y, deltas)

        return linear("down_proj", jax.nn.silu(linear("gate_proj", x)) * linear("up_proj", x))


class Block(nn.Module):
    config: DecoderConfig
    segments: Segments | None = None

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Any],
        layer: jax.Array,
        deltas: Deltas,
        context: Context,
        queries: Queries | None = None,
    ) -> tuple[tuple[jax.Array, Any], None]:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x, kv = carry

        def norm(name: str) -> Callable[[jax.Array], jax.Array]:
            module = RMSNorm(c.rms_norm_eps, dtype, name=name)
            return lambda y: module(y, pick(deltas, name))

        with jax.named_scope("attention"):
            normed = norm("input_layernorm")
            y, asking = normed(x), None
            if queries is not None:
                x = jnp.take_along_axis(x, queries.row_index[..., None], axis=1)
                asking = (normed(x), queries.position)
            attend = Attention(c, self.segments, name="self_attn")
            y, kv = attend(y, pick(deltas, "self_attn"), kv, layer, context, asking)
            x = x + y
        with jax.named_scope("mlp"):
            y = norm("post_attention_layernorm")(x)
            x = x + MLP(c, name="mlp")(y, pick(deltas, "mlp"))
        return (x, kv), None
