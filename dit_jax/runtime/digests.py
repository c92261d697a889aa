"""Digests of pytrees, which identify a base model, an adapter or a training state."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.runtime import parallel


def digest_tree(tree: Any, dtype: Any = None) -> str:
    """sha256 (hex) of the names, dtypes, shapes and exact values of a pytree of arrays.

    Args:
        dtype: values are converted to it first. Default: they stay as they are.
    """
    total = hashlib.sha256()
    named = {
        jax.tree_util.keystr(path): leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    # Sorted by name, so that the digest does not depend on how the containers order their keys.
    for name in sorted(named):
        leaf = named[name]
        kind = leaf.dtype if dtype is None else jnp.dtype(dtype)
        total.update(f"{name}:{kind}:{np.shape(leaf)};".encode())
        for block in parallel.host_blocks(leaf):
            array = np.ascontiguousarray(block.astype(kind, copy=False))
            total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def base_digest(params: Any) -> str:
    """sha256 (hex) that identifies a base model by its params, whatever float dtype they are loaded in.

    Values are rounded to bfloat16 first, so that a checkpoint has one digest in float32 and in bfloat16, and another
    one after a further training step.
    """
    return digest_tree(params, "bfloat16")
