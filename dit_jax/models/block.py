"""One layer: attention and feed-forward network, each with what the deltas hold for it."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.models import attention as attention_lib
from dit_jax.models.attention import Segments
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Deltas
from dit_jax.models.layers import Linear, RMSNorm, pick, rope
from dit_jax.models.modules import module_table
from dit_jax.runtime.parallel import FREE, constrain


class Context(NamedTuple):
    """What every layer needs beside its activations; the same for all layers."""

    positions: jax.Array
    lengths: jax.Array | None
    mask: jax.Array | None
    end: jax.Array | None


class Queries(NamedTuple):
    """The only positions [B, P] whose outputs are wanted, in their segments and in the whole row."""

    position: jax.Array
    row_index: jax.Array


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
        """asking: inputs [B, P, D] and positions [B, P] of the queries, where they are not all of x."""
        c, table = self.config, module_table(self.config)
        dtype = jnp.dtype(c.dtype)
        x_q, position = (x, None) if asking is None else asking

        def linear(name: str, x: jax.Array) -> jax.Array:
            return Linear(table["layers", "self_attn", name], dtype, name=name)(
                x, pick(deltas, name)
            )

        def heads(name: str, x: jax.Array = x) -> jax.Array:
            y = linear(name, x).reshape(*x.shape[:2], -1, c.head_dim)
            return constrain(y, FREE, FREE, table["layers", "self_attn", name].axes[1], None)

        def norm(name: str, y: jax.Array) -> jax.Array:
            return RMSNorm(c.rms_norm_eps, dtype, name=name)(y, pick(deltas, name))

        q = norm("q_norm", heads("q_proj", x_q))
        k = norm("k_norm", heads("k_proj"))
        v = heads("v_proj")
        q = rope(q, context.positions if position is None else position, c.rope_theta)
        k = rope(k, context.positions, c.rope_theta)
        if kv is not None:
            # The cache of all layers travels as one carried array, so that XLA updates it in place.
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
        table, dtype = module_table(self.config), jnp.dtype(self.config.dtype)

        def linear(name: str, y: jax.Array) -> jax.Array:
            return Linear(table["layers", "mlp", name], dtype, name=name)(y, pick(deltas, name))

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
