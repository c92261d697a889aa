"""Shardings of the project's pytrees on a mesh: parameters, deltas, token batches. See docs/sharding.md."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dit_jax.data.batch import TokenBatch
from dit_jax.models.decoder import Params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, map_modules
from dit_jax.models.layer_views import abstract_layers
from dit_jax.models.modules import Module, abstract_weights, all_modules, get_at, make_tree
from dit_jax.runtime import parallel


def _units(config: DecoderConfig, axes: Any, shape: tuple[int, ...]) -> list[int]:
    """Sizes of the axes; for axes of heads the number of heads, so that none is ever cut."""
    heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    return [heads.get(axis, size) for axis, size in zip(axes, shape, strict=True)]


def param_shardings(config: DecoderConfig, mesh: Mesh) -> Params:
    """A NamedSharding for every parameter: split over fsdp and tensor, and copied along data."""

    def one(module: Module) -> NamedSharding:
        units = _units(config, module.stacked_axes, module.stacked)
        return NamedSharding(mesh, parallel.spec(mesh, module.stacked_axes, units))

    return make_tree(config, one)


def param_placer(config: DecoderConfig, mesh: Mesh) -> Any:
    """The callback `place` of `load_params`: each device gets its part of a leaf directly from the host."""
    shardings = param_shardings(config, mesh)

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        return parallel.put(array, get_at(shardings, path))

    return place


def delta_axes(config: DecoderConfig, delta: Delta, batch_axis: int | None = None) -> Any:
    """Logical axes of every leaf of a delta, taken from those of the parameters that it changes.

    Args:
        batch_axis: None for one delta that all examples share. 0: leaves [B, L, …]. 1: leaves [L, B, …].
            With a batch the axes `embed` stay whole, because the batch of deltas is what is split over fsdp.
    """
    table = all_modules(config)

    def axes(path: tuple[str, ...], leaves: Delta) -> dict[str, Any]:
        layers, inner = ("layers",) if table[path].layers else (), table[path].axes
        if batch_axis is not None:
            inner = tuple(None if axis == "embed" else axis for axis in inner)
        named = {
            "a": (*layers, inner[0], None),
            "b": (*layers, None, inner[-1]),
            "scale": layers,
            "w": (*layers, *inner),
        }
        if batch_axis is not None:
            named = {k: (*v[:batch_axis], "batch", *v[batch_axis:]) for k, v in named.items()}
        return {name: named[name] for name in leaves}

    return map_modules(axes, delta)


def delta_shardings(
    config: DecoderConfig, mesh: Mesh, delta: Delta, batch_axis: int | None = None
) -> Any:
    """A NamedSharding for every leaf of a delta (arrays or ShapeDtypeStructs), see `delta_axes`."""
    axes = delta_axes(config, delta, batch_axis)

    def one(leaf: Any, names: Any) -> NamedSharding:
        units = _units(config, names, np.shape(leaf))
        return NamedSharding(mesh, parallel.spec(mesh, names, units))

    return jax.tree.map(one, delta, axes)


def put_delta(config: DecoderConfig, mesh: Mesh | None, delta: Delta) -> Delta:
    """Puts a delta that all examples share on the mesh or the one device, if it is not there already."""
    if mesh is None:
        # Not committed to a device: what a program takes must not differ in that from what it returns (`layer_views`).
        return jax.device_put(delta, may_alias=True)
    return jax.tree.map(parallel.put, delta, delta_shardings(config, mesh, delta))


def put_deltas(
    config: DecoderConfig, mesh: Mesh | None, local: Delta, size: int, batch_axis: int
) -> Delta:
    """Puts a batch of `size` deltas on the mesh; `local` holds this process's rows (`parallel.local_rows`)."""
    if mesh is None:
        return local

    def whole(x: Any) -> jax.ShapeDtypeStruct:
        shape = (*x.shape[:batch_axis], size, *x.shape[batch_axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)

    shardings = delta_shardings(config, mesh, jax.tree.map(whole, local), batch_axis)
    return parallel.put_rows(local, mesh, size, shardings, batch_axis)


def constrain_delta(config: DecoderConfig, delta: Delta, batch_axis: int | None = None) -> Delta:
    """Pins the sharding of a delta inside a compiled function; without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return delta
    axes = delta_axes(config, delta, batch_axis)

    def one(leaf: jax.Array, names: Any) -> jax.Array:
        units = _units(config, names, leaf.shape)
        return jax.lax.with_sharding_constraint(leaf, parallel.spec(mesh, names, units))

    return jax.tree.map(one, delta, axes)


def abstract_params(config: DecoderConfig, mesh: Mesh | None) -> Params:
    """ShapeDtypeStructs of the parameters with their shardings, to compile programs for a machine that is not there."""
    shapes = abstract_weights(config)
    if mesh is None:
        return {**shapes, "layers": abstract_layers(shapes["layers"], config)}
    return with_shardings(shapes, param_shardings(config, mesh))


def abstract_batch(
    mesh: Mesh | None, leading: tuple[int, ...], length: int, scored: int
) -> TokenBatch:
    """ShapeDtypeStructs of a token batch that is split over its first axis: tokens [*leading, length], and so on."""

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else parallel.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((*leading, *shape), dtype, sharding=sharding)

    tokens, lengths = array((length,), np.int32), array((), np.int32)
    position, weight = array((scored,), np.int32), array((scored,), np.float32)
    return TokenBatch(tokens, lengths, position, position, weight)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """The same ShapeDtypeStructs with shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
