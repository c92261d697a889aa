"""Deltas as pytrees: make, merge, combine, compare. The tree is described in docs/architecture.md."""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, map_modules
from dit_jax.models.modules import EMBEDDING, HEAD, PROJECTIONS, check_projections, get_at, set_at
from dit_jax.models.modules import projections as lora_modules


def check_lora_rank(
    config: DecoderConfig, rank: int, projections: Sequence[str], what: str = "the LoRA rank"
) -> None:
    """Raises DitError for a rank below 1 or above the size of a projection; `what` names the rank."""
    most = min(max(lora_modules(config)[name].shape) for name in projections)
    if not 1 <= rank <= most:
        raise DitError(f"{what} must be from 1 to {most}, not {rank}")


def init_lora(
    config: DecoderConfig,
    key: jax.Array,
    rank: int,
    *,
    projections: Sequence[str] = PROJECTIONS,
    fan_in: str = "out",
    init_scale: float = 1.0,
) -> Delta:
    """A LoRA delta that changes nothing yet: `b` is uniform, `a` is zero (paper, section 3; the reverse of PEFT).

    Its scale is 1 / rank, and it is float32.

    Args:
        fan_in: `b` is uniform in ±sqrt(6 / fan_in), where fan_in is rank * out ("out") or rank ("rank"). The reference
            uses the first for weight diffs and the second for the adapter.
        init_scale: multiplies that bound.

    Raises:
        DitError: see `check_lora_rank` and `check_projections`.
    """
    check_projections(projections)
    check_lora_rank(config, rank, projections)
    delta: dict[str, Any] = {}
    for name, subkey in zip(projections, jax.random.split(key, len(projections)), strict=True):
        module = lora_modules(config)[name]
        size, (inputs, outputs) = module.layers, module.shape
        bound = init_scale * math.sqrt(6 / (rank * outputs if fan_in == "out" else rank))
        factors = {
            "a": jnp.zeros((size, inputs, rank), jnp.float32),
            "b": jax.random.uniform(subkey, (size, rank, outputs), jnp.float32, -bound, bound),
            "scale": jnp.full((size,), 1 / rank, jnp.float32),
        }
        set_at(delta, module.path, factors)
    return delta


def abstract_lora(
    config: DecoderConfig, rank: int, projections: Sequence[str] = PROJECTIONS
) -> Delta:
    """`init_lora` as ShapeDtypeStructs."""
    return jax.eval_shape(
        lambda: init_lora(config, jax.random.key(0), rank, projections=projections)
    )


def trainable(delta: Delta) -> Delta:
    """The leaves that an optimizer may change: everything but `scale`."""
    return map_modules(lambda _, m: {k: v for k, v in m.items() if k != "scale"}, delta)


def with_scale(leaves: Delta, delta: Delta) -> Delta:
    """`leaves` (see `trainable`) with the scales of `delta` put back."""

    def put(path: tuple[str, ...], module: Delta) -> Delta:
        other = get_at(delta, path)
        return {**module, "scale": other["scale"]} if "scale" in other else module

    return map_modules(put, leaves)


def _change(module: Delta) -> Any:
    """What a module of a delta adds to its weight: [L, in, out] in a projection."""
    if "w" in module:
        return module["w"]
    return jnp.einsum("LDR,LRF,L->LDF", module["a"], module["b"], module["scale"])


def merged_config(config: DecoderConfig, *deltas: Delta) -> DecoderConfig:
    """The config of params ⊕ deltas: a delta with a change of a tied head unties it."""
    unties = config.tie_word_embeddings and any(HEAD[0] in delta for delta in deltas)
    return dataclasses.replace(config, tie_word_embeddings=False) if unties else config


def merge(params: Any, *deltas: Delta) -> Any:
    """params ⊕ deltas as a new parameter tree: the reference for applying deltas functionally, and for export.

    It is a tree of `merged_config`.
    """
    merged = jax.tree.map(lambda x: x, params)
    table = params[EMBEDDING[0]]["embedding"]
    unties = HEAD[0] not in params and any(HEAD[0] in delta for delta in deltas)
    if unties:
        merged[HEAD[0]] = {"kernel": table.T}
    for delta in deltas:

        def add(path: tuple[str, ...], module: Delta) -> Delta:
            node = get_at(merged, path)
            (leaf,) = node
            # One product at a time: all together they would take the memory of another model in fp32.
            node[leaf] = node[leaf] + _change(module).astype(node[leaf].dtype)
            return module

        map_modules(add, delta)
        if unties and HEAD[0] not in delta and EMBEDDING[0] in delta:
            add(HEAD, {"w": delta[EMBEDDING[0]]["w"].T})
    return merged


def scaled(delta: Delta, factor: float) -> Delta:
    """`factor` times a delta."""

    def times(_: Any, module: Any) -> Any:
        return {k: v * factor if k in ("scale", "w") else v for k, v in module.items()}

    with np.errstate(over="ignore"):  # who asks says that the logits overflow
        return map_modules(times, delta)


def noise_like(delta: Delta, key: jax.Array) -> Delta:
    """Gaussian noise with the norm of each factor in each layer: a control of the same size without meaning."""

    def replace(path: tuple[str, ...], module: Delta) -> Delta:
        out = dict(module)
        for index, name in enumerate(n for n in ("a", "b", "w") if n in module):
            leaf = module[name]
            subkey = jax.random.fold_in(key, _stable_hash((*path, str(index))))
            noise = jax.random.normal(subkey, leaf.shape, leaf.dtype)
            axes = tuple(range(1 if path[0] == "layers" else 0, leaf.ndim))
            # Sums of squares in float16 are infinite.
            wide = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (leaf, noise)]
            norm, size = (jnp.linalg.norm(x, axis=axes, keepdims=True) for x in wide)
            out[name] = (wide[1] * norm / size).astype(leaf.dtype)
        return out

    return map_modules(replace, delta)


def per_example(stacked: Delta) -> Delta:
    """[B, L, …] (deltas stacked on axis 0) -> [L, B, …], the form that one batched forward pass takes."""
    # The arrays' own method keeps host arrays on the host, and one transfer takes them all.
    return jax.tree.map(lambda x: x.swapaxes(0, 1), stacked)


def is_lora(deltas: Any) -> bool:
    """Whether a delta, or a tree of several, has LoRA factors alone: diffs of one `layout` then share a batch."""
    leaves = jax.tree_util.tree_flatten_with_path(deltas)[0]
    return all(path[-1].key != "w" for path, _ in leaves)


def layout(deltas: Any) -> Hashable:
    """Modules, shapes and dtypes of a tree of deltas: trees of one layout can be stacked."""
    leaves, structure = jax.tree.flatten(deltas)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def num_parameters(delta: Delta) -> int:
    """Number of trainable entries."""
    return sum(x.size for x in jax.tree.leaves(trainable(delta)))


def _stable_hash(parts: tuple[str, ...]) -> int:
    value = 0
    for char in "/".join(parts):
        value = (value * 31 + ord(char)) % 2**31
    return value
