"""One layer of the decoder: attention and feed-forward network, each with its part of the deltas."""

import functools
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
from dit_jax.models.kv_cache import View, append
from dit_jax.models.layer_kinds import Layer, pick_kind, window_over
from dit_jax.models.layers import Bias, Linear, make_norm, pick
from dit_jax.models.modules import bias_of, module_table
from dit_jax.runtime.parallel import FREE, constrain


class Context(NamedTuple):
    """What every layer needs besides its activations. It is the same for all layers.

    Attributes:
        positions: [B, T], of the tokens in their texts.
        lengths: [B, segments], or
        masks: [B, T, S], one for each kind of layer (`layer_kinds`) or one for all.
        cache: where new keys and values go.
    """

    positions: jax.Array
    lengths: jax.Array | None
    masks: tuple[jax.Array, ...] | None
    cache: View | None


class Queries(NamedTuple):
    """The positions [B, P] whose outputs are wanted: in their segments, and in the whole row."""

    position: jax.Array
    row_index: jax.Array


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


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
    """Self-attention: [B, T, D] -> [B, T, D], or [B, P, D] at the queries; and `kv`, the cache with new entries."""

    config: DecoderConfig
    segments: Segments | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        deltas: Deltas,
        kv: Any,
        layer: Layer,
        context: Context,
        asking: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Any]:
        """asking: inputs [B, P, D] and positions [B, P] of the queries. None: all of x are queries."""
        c, table = self.config, module_table(self.config)
        x_q, position = (x, None) if asking is None else asking

        def linear(name: str, x: jax.Array) -> jax.Array:
            return _linear(c, "self_attn", name, x, deltas)

        def heads(name: str, x: jax.Array = x) -> jax.Array:
            y = linear(name, x).reshape(*x.shape[:2], -1, c.head_dim)
            return constrain(y, FREE, FREE, table["layers", "self_attn", name].axes[1], None)

        def norm(name: str, y: jax.Array) -> jax.Array:
            if not c.qk_norm:
                return y
            return make_norm(c, name)(y, pick(deltas, name))

        q = norm("q_norm", heads("q_proj", x_q))
        k = norm("k_norm", heads("k_proj"))
        v = heads("v_proj")
        kind = 0 if layer.kind is None else layer.kind
        turn = rope.angles(c, kind)
        q = rope.rotate(q, context.positions if position is None else position, *turn)
        k = rope.rotate(k, context.positions, *turn)
        if context.cache is not None:
            kv, (k, v) = append(kv, (k, v), layer, kind, context.cache)
        scale = c.query_pre_attn_scalar**-0.5 if c.query_pre_attn_scalar else None
        if self.segments is None:
            mask = pick_kind(cast(tuple[jax.Array, ...], context.masks), kind)
            y = attention_lib.attention(q, k, v, mask=mask, scale=scale, impl=c.attention)
        else:
            y = attention_lib.segmented_attention(
                q,
                k,
                v,
                lengths=cast(jax.Array, context.lengths),
                segments=self.segments,
                position=position,
                window=functools.partial(window_over, c, kind),
                scale=scale,
                impl=c.attention,
            )
        return linear("o_proj", y.reshape(*y.shape[:2], -1)), kv


class MLP(nn.Module):
    """The gated feed-forward network, [B, T, D] -> [B, T, D]: down(act(gate x) · up x)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, deltas: Deltas) -> jax.Array:
        def linear(name: str, y: jax.Array) -> jax.Array:
            return _linear(self.config, "mlp", name, y, deltas)

        act = _ACTIVATIONS[self.config.hidden_act]
        return linear("down_proj", act(linear("gate_proj", x)) * linear("up_proj", x))


class Block(nn.Module):
    """One layer as a scan takes it: (x [B, T, D], kv) -> the same; with `queries` x becomes [B, P, D]."""

    config: DecoderConfig
    segments: Segments | None = None

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, Any],
        layer: Layer,
        deltas: Deltas,
        context: Context,
        queries: Queries | None = None,
    ) -> tuple[tuple[jax.Array, Any], None]:
        c = self.config
        x, kv = carry

        def norm(name: str) -> Callable[[jax.Array], jax.Array]:
            module = make_norm(c, name)
            return lambda y: module(y, pick(deltas, name))

        with jax.named_scope("attention"):
            normed = norm("input_layernorm")
            y, asking = normed(x), None
            if queries is not None:
                x = jnp.take_along_axis(x, queries.row_index[..., None], axis=1)
                asking = (normed(x), queries.position)
            attend = Attention(c, self.segments, name="self_attn")
            y, kv = attend(y, pick(deltas, "self_attn"), kv, layer, context, asking)
            if c.sandwich_norm:
                y = norm("post_attention_layernorm")(y)
            x = x + y
        with jax.named_scope("mlp"):
            before = "pre_feedforward" if c.sandwich_norm else "post_attention"
            y = MLP(c, name="mlp")(norm(f"{before}_layernorm")(x), pick(deltas, "mlp"))
            if c.sandwich_norm:
                y = norm("post_feedforward_layernorm")(y)
            x = x + y
        return (x, kv), None
