"""The cache of keys and values: all of them, or in windowed layers a ring of the last ones.

Letters: L layers, B batch, S slots of a row, T new tokens, K kv heads, H head_dim.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.layer_kinds import Kind, Layer, layer_kinds, pick_kind
from dit_jax.runtime.parallel import constrain


class Cache(NamedTuple):
    """Keys and values of all layers, filled from slot 0; `valid` [B, S] says which count.

    k, v: one array where layers are scanned: [L, B, S, K, H], or [1, B, slots of all layers, K, H] where some layers
    need fewer slots than others. Else for each layer one of its own, [1, B, S, K, H]: a layer's part of one array
    would be copied for its products. A layer whose window is shorter than S has as many slots as its window, and token
    t in slot t modulo that number.
    """

    k: Any
    v: Any
    valid: jax.Array
    end: jax.Array  # scalar int32: the next free slot, the same for all rows (rows are left padded)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["end"], meta_fields=["rings", "offsets"]
)
@dataclasses.dataclass(frozen=True)
class View:
    """What layers need to know of the cache, the same for all layers. Without `rings` slot t holds token t.

    Attributes:
        end: see `Cache`.
        rings: static, for each kind of layers its number of slots; () where all have S.
        offsets: static, for each layer its first slot, where all share one axis of slots.
    """

    end: jax.Array
    rings: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()


def view(config: DecoderConfig, cache: Cache) -> View:
    """The view of a cache before new tokens are put in."""
    rings, offsets = _layout(config, cache.valid.shape[1])
    return View(cache.end, rings, offsets)


def _layout(config: DecoderConfig, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kinds, of_layer = layer_kinds(config)
    rings = tuple(min(kind.window or size, size) for kind in kinds)
    if all(ring == size for ring in rings):
        return (), ()
    if not config.scan_layers or len(kinds) == 1:
        return rings, ()
    # The short ones first: a slice of the longest size that starts at any of them ends inside the array.
    offsets, total = [0] * len(of_layer), 0
    for layer in sorted(range(len(of_layer)), key=lambda layer: rings[of_layer[layer]]):
        offsets[layer], total = total, total + rings[of_layer[layer]]
    return rings, tuple(offsets)


def cache_slots(config: DecoderConfig, size: int) -> int:
    """Slots of all layers together, of one row of `size` tokens."""
    kinds, of_layer = layer_kinds(config)
    rings = _layout(config, size)[0] or (size,) * len(kinds)
    return sum(rings[kind] for kind in of_layer)


def init_cache(config: DecoderConfig, batch: int, size: int) -> Cache:
    """An empty cache for `size` tokens per row."""
    kinds, of_layer = layer_kinds(config)
    rings, offsets = _layout(config, size)
    rings = rings or (size,) * len(kinds)

    def zeros(count: int, slots: int) -> jax.Array:
        shape = (count, batch, slots, config.num_key_value_heads, config.head_dim)
        empty = jnp.zeros(shape, jnp.dtype(config.dtype))
        return constrain(empty, None, "batch", None, "kv_heads", None)

    if not config.scan_layers:
        both: Any = tuple(zeros(1, rings[kind]) for kind in of_layer)
    elif offsets:
        both = zeros(1, cache_slots(config, size))
    else:
        both = zeros(config.num_hidden_layers, rings[0])
    return Cache(both, both, jnp.zeros((batch, size), bool), jnp.zeros((), jnp.int32))


def cached_masks(
    config: DecoderConfig, cache: Cache, valid: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """What T new tokens see of what `append` gives them, for each kind of layers or for all; and the new `valid`.

    Args:
        valid: [B, T], of the new tokens.
    """
    length = valid.shape[1]
    slots = jnp.arange(cache.valid.shape[1])
    valid = jax.lax.dynamic_update_slice(cache.valid, valid.astype(bool), (0, cache.end))
    query = (cache.end + jnp.arange(length))[:, None]
    rings, offsets = _layout(config, cache.valid.shape[1])
    if not rings:
        causal = slots[None, :] <= query
        return (causal[None] & valid[:, None, :],), valid

    def mask(ring: int, window: int) -> jax.Array:
        token = _tokens(ring, max(rings) if offsets else ring, cache.end + (length == 1))
        if length > 1:  # the new ones stand beside the slots
            token = jnp.concatenate([token, cache.end + jnp.arange(length)])
        near = (token <= query) & (token > query - (window or valid.shape[1])) & (token >= 0)
        return near[None] & valid[:, None, jnp.maximum(token, 0)]

    kinds, _ = layer_kinds(config)
    return tuple(mask(r, k.window) for r, k in zip(rings, kinds, strict=True)), valid


def _tokens(ring: Any, size: int, end: jax.Array) -> jax.Array:
    """Which token each of the slots [size] of a ring holds when `end` are in; negative: none."""
    slots = jnp.arange(size)
    newest = end - 1
    return jnp.where(slots < ring, newest - (newest - slots) % ring, -1)


def append(
    kv: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    layer: Layer,
    kind: Kind,
    seen: View,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Puts new keys and values [B, T, K, H] into a layer's part of the cache.

    Returns:
        The cache, and the keys and values that the new tokens may see (`cached_masks`): those of the layer's slots,
        for several tokens and a ring as they were before, followed by the new ones.
    """
    length = new[0].shape[1]
    # The cache of all layers travels as one carried array, so that XLA updates it in place.
    if not seen.rings:
        start: Any = (layer.index, 0, seen.end, 0, 0)
        kv = _write(kv, new, start)
        k, v = (jax.lax.dynamic_index_in_dim(y, layer.index, keepdims=False) for y in kv)
        return kv, (k, v)

    ring, size = pick_kind(seen.rings, kind), max(seen.rings)
    index, offset = layer.index, jnp.asarray(0)
    if seen.offsets:
        index, offset = jnp.asarray(0), jnp.asarray(seen.offsets)[layer.index]
    elif isinstance(kind, int):
        size = seen.rings[kind]

    def read(y: jax.Array) -> jax.Array:
        shape = (1, y.shape[1], size, *y.shape[3:])
        return jax.lax.dynamic_slice(y, (index, 0, offset, 0, 0), shape)[0]

    if length == 1:
        kv = _write(kv, new, (index, 0, offset + seen.end % ring, 0, 0))
        return kv, (read(kv[0]), read(kv[1]))
    old = (read(kv[0]), read(kv[1]))
    token = _tokens(ring, size, seen.end + length)
    fresh = (token >= seen.end)[:, None, None]
    source = jnp.maximum(token - seen.end, 0)
    updated = tuple(
        jnp.where(fresh, y[:, source].astype(x.dtype), x) for x, y in zip(old, new, strict=True)
    )
    kv = _write(kv, updated, (index, 0, offset, 0, 0))
    k, v = (jnp.concatenate([x, y.astype(x.dtype)], axis=1) for x, y in zip(old, new, strict=True))
    return kv, (k, v)


def _write(kv: Any, new: Any, start: Any) -> Any:
    return tuple(
        jax.lax.dynamic_update_slice(old, part[None].astype(old.dtype), start)
        for old, part in zip(kv, new, strict=True)
    )
