"""Attention: one function with several implementations, which must agree."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.models.layer_kinds import Window
from dit_jax.models.products import product
from dit_jax.runtime.parallel import per_device, splits
from dit_jax.runtime.sizes import next_multiple

# (tokens, queries) of each segment of a row.
Segments = tuple[tuple[int, int], ...]

SPLASH_LANES = 128  # the kernel's blocks are multiples of this length,
SPLASH_BLOCK = 512  # and at most this long


def attention(
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    *,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    window: Window = None,
    scale: float | None = None,
    impl: str = "xla",
) -> jax.Array:
    """Grouped-query attention, softmax in fp32; returns [B, T, N, H] in the dtype of q.

    Args:
        mask: [B, T, S] bool, True where query t sees key s. Exactly one of mask and lengths is given.
        lengths: [B] int, for causal attention over right-padded rows with that many real tokens (T = S).
            This is the fast path: no mask of size T x S is made where the implementation can avoid it.
        window: how many tokens a query sees, itself included; only with `lengths`.
        scale: of the scores. None: 1 / sqrt(H).
        impl: see `decoder_config.ATTENTION`. "cudnn" and "splash" need `lengths`. Plain attention replaces both where
            a mask is given or the window is traced (it differs between scanned layers), and "splash" where the heads
            of keys and values cannot be split over the mesh.
    """
    if (mask is None) == (lengths is None):
        raise ValueError("give either mask or lengths")
    if lengths is not None and not isinstance(window, jax.Array):
        if impl == "cudnn":
            return jax.nn.dot_product_attention(
                q_BxTxNxH,
                k_BxSxKxH,
                v_BxSxKxH,
                is_causal=True,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                local_window_size=None if window is None else (window - 1, 0),
                scale=scale,
                implementation="cudnn",
            )
        # Causal attention needs no mask for right padding: no real query sees it.
        if impl == "splash" and splits("kv_heads", k_BxSxKxH.shape[2]):
            of_heads = ("heads", "kv_heads", "kv_heads")
            axes = tuple(("batch", None, heads, None) for heads in of_heads)
            splash = functools.partial(_splash_attention, window=window, scale=scale)
            return per_device(splash, axes, q_BxTxNxH, k_BxSxKxH, v_BxSxKxH)
    if mask is None:
        mask = causal_mask(lengths, q_BxTxNxH.shape[1], window)
    return _xla_attention(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, mask, scale)


def segmented_attention(
    q_BxPxNxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    *,
    lengths: jax.Array,
    segments: Segments,
    position: jax.Array | None = None,
    window: Callable[[int], Window] = lambda length: None,
    scale: float | None = None,
    impl: str = "xla",
) -> jax.Array:
    """Causal attention inside the segments of each row; returns [B, P, N, H].

    Args:
        lengths: [B, segments] int, the real tokens of each segment.
        segments: the numbers of tokens and of queries of each segment; T and P are their sums.
            Neighbours of equal size are computed together.
        position: [B, P], the position of each query in its segment. None: every token is a query.
        window: from the number of tokens of a segment to how many of them a query sees.
        scale, impl: see `attention`.
    """
    batch = k_BxTxKxH.shape[0]
    groups = [(*size, len(list(group))) for size, group in itertools.groupby(segments)]

    def split(x: jax.Array, sizes: list[int]) -> list[jax.Array]:
        """The rows of each group, [B * count, size, …]. The gradient of a split is a concatenation, of slices a sum."""
        widths = [size * count for size, (_, _, count) in zip(sizes, groups, strict=True)]
        parts = jax.lax.split(x, widths, axis=1)
        return [y.reshape(-1, size, *x.shape[2:]) for y, size in zip(parts, sizes, strict=True)]

    keys = [size for size, _, _ in groups]
    queries = keys if position is None else [size for _, size, _ in groups]
    real = split(lengths, [1] * len(groups))
    asked = None if position is None else split(position, queries)
    outputs = []
    for group, (q, k, v) in enumerate(
        zip(split(q_BxPxNxH, queries), split(k_BxTxKxH, keys), split(v_BxTxKxH, keys), strict=True)
    ):
        width = window(keys[group])
        if asked is None:
            y = attention(q, k, v, lengths=real[group][:, 0], window=width, scale=scale, impl=impl)
        else:
            key_index, query = jnp.arange(keys[group]), asked[group][..., None]
            mask = (key_index <= query) & (key_index < real[group][..., None])
            if width is not None:
                mask &= key_index > query - width
            y = attention(q, k, v, mask=mask, scale=scale, impl=impl)
        outputs.append(y.reshape(batch, -1, *y.shape[2:]))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def causal_mask(lengths: jax.Array | None, size: int, window: Window = None) -> jax.Array:
    """A causal mask [B, T, T] that hides keys beyond a row's length, or [1, T, T] without lengths."""
    causal = jnp.tril(jnp.ones((1, size, size), bool))
    if window is not None:
        index = jnp.arange(size)
        causal &= index > index[:, None] - window
    if lengths is None:
        return causal
    return causal & (jnp.arange(size) < lengths[:, None])[:, None, :]


def _splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: int | None, scale: float | None
) -> jax.Array:
    """Causal attention by jax's TPU kernel, which keeps no scores, for one device's part of batch and heads."""
    # Imported here: Pallas takes half a second to import, and only this function needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, count = q.shape[1:3]
    padded = next_multiple(length, SPLASH_LANES)
    sizes = range(SPLASH_LANES, SPLASH_BLOCK + 1, SPLASH_LANES)
    block = max(size for size in sizes if padded % size == 0)

    def heads_first(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    shape = (padded, padded)
    see: Any = splash.CausalMask(shape)
    if window is not None:
        see = splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([see] * count),
        block_sizes=splash.BlockSizes(*(block,) * 6, use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
    )
    scaled = q * (scale or q.shape[-1] ** -0.5)  # the kernel does not scale
    y = jax.vmap(kernel)(heads_first(scaled), heads_first(k), heads_first(v))
    return y.swapaxes(1, 2)[:, :length]


def _xla_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float | None
) -> jax.Array:
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    # G query heads share one key/value head. G is an axis of its own, so that k and v are never repeated.
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = (_scores if q.dtype == jnp.float32 else _half_scores)(q, k) * (scale or head_dim**-0.5)
    # The floor is finite: a padding query sees nothing, and -inf everywhere would turn its row into NaN.
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = product("BKGTS,BSKH->BTKGH", weights, v)
    return out.reshape(batch, queries, heads, head_dim)


def _scores(q_BxTxKxGxH: jax.Array, k_BxSxKxH: jax.Array) -> jax.Array:
    """fp32 products of queries and keys, [B, K, G, T, S]."""
    return jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BxTxKxGxH, k_BxSxKxH, preferred_element_type=jnp.float32
    )


# The same with a backward pass in half precision. By default the fp32 gradient would make both products of the backward
# pass fp32 products on copies of q and k.
_half_scores = jax.custom_vjp(_scores)


def _half_forward(q: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scores(q, k), (q, k)


def _half_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    q, k = saved
    gradient = gradient.astype(q.dtype)
    of_q = product("BKGTS,BSKH->BTKGH", gradient, k)
    return of_q, product("BKGTS,BTKGH->BSKH", gradient, q)


_half_scores.defvjp(_half_forward, _half_backward)
