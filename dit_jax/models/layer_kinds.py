"""What differs between the layers of a model: how far back they see, and their rope. Data of a scan over them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.models.decoder_config import WINDOWED, DecoderConfig, Scaling

# Which kind a layer is: static where layers are unrolled or all alike, else an int32 that the scan brings.
Kind = int | jax.Array
# How many tokens a query sees, itself included; None: all before it.
Window = int | jax.Array | None


class LayerKind(NamedTuple):
    """A kind of layers; `window` 0: they see all tokens before."""

    window: int
    rope_theta: float
    rope_scaling: Scaling


class Layer(NamedTuple):
    """Which layer it is: its place in what holds all of them, and its kind (None: all are alike)."""

    index: Any
    kind: Any = None


@functools.lru_cache
def layer_kinds(config: DecoderConfig) -> tuple[tuple[LayerKind, ...], tuple[int, ...]]:
    """The kinds of layers that a model has, and the kind of each layer as an index into them."""
    types = config.layer_types or (WINDOWED,) * config.num_hidden_layers
    windowed = LayerKind(
        config.sliding_window,
        config.rope_local_base_freq or config.rope_theta,
        () if config.rope_local_base_freq else config.rope_scaling,
    )
    full = LayerKind(0, config.rope_theta, config.rope_scaling)
    each = [windowed if kind == WINDOWED else full for kind in types]
    kinds = tuple(dict.fromkeys(each))
    return kinds, tuple(kinds.index(kind) for kind in each)


def scanned(config: DecoderConfig) -> Layer:
    """All layers as a scan takes them apart."""
    kinds, of_layer = layer_kinds(config)
    indices = jnp.arange(config.num_hidden_layers)
    return Layer(indices, jnp.asarray(of_layer, jnp.int32) if len(kinds) > 1 else None)


def pick_kind(values: Sequence[Any], kind: Kind) -> Any:
    """One of the values, of which there is one for each kind, or one for all."""
    if len(values) == 1:
        return values[0]
    return values[kind] if isinstance(kind, int) else jnp.stack([*map(jnp.asarray, values)])[kind]


def window_over(config: DecoderConfig, kind: Kind, length: int) -> Window:
    """The window of a layer over texts of so many tokens; None where none of the model's layers has a shorter one."""
    windows = [k.window if 0 < k.window < length else length for k in layer_kinds(config)[0]]
    if min(windows) == length:
        return None
    found: int | jax.Array = pick_kind(windows, kind)
    return None if isinstance(found, int) and found == length else found
