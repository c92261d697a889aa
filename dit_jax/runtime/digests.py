"""Digests of pytrees, which identify a base model, an adapter or a training state."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.runtime import parallel


def _digest_leaves(tree: Any, convert: Callable[[np.ndarray], np.ndarray]) -> str:
    total = hashlib.sha256()
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # Sorted by name, so that the digest does not depend on how the containers order their keys.
    named = {
        jax.tree_util.keystr(path): leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        for path, leaf in leaves
    }
    for name, leaf in sorted(named.items(), key=lambda item: item[0]):
        dtype = convert(np.empty((0,), leaf.dtype)).dtype
        total.update(f"{name}:{dtype}:{np.shape(leaf)};".encode())
        for block in parallel.host_blocks(leaf):
            array = np.ascontiguousarray(convert(block))
            total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def digest_tree(tree: Any) -> str:
    """sha256 (hex) of the names, dtypes, shapes and exact values of a pytree of arrays."""
    return _digest_leaves(tree, lambda array: array)


def base_digest(params: Any) -> str:
    """sha256 (hex) that identifies a base model by its params, whatever float dtype they are loaded in.

    Values are rounded to bfloat16 first, so that a checkpoint has one digest in float32 and in bfloat16, and another
    one after a further training step.
    """

    def canonical(array: np.ndarray) -> np.ndarray:
        return array.astype(jnp.dtype("bfloat16"))

    return _digest_leaves(params, canonical)
