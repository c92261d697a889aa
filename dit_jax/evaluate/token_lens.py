"""What a diff writes and what it reads, in tokens: its factors in the spaces of the unembedding and the embedding."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dit_jax.api import Model
from dit_jax.deltas.factors import modules, squares
from dit_jax.models.delta_trees import Delta
from dit_jax.models.head import head_path
from dit_jax.models.modules import (
    EMBEDDING,
    all_modules,
    module_table,
    stream_readers,
    stream_writers,
    weight,
)
from dit_jax.runtime import parallel

DIRECTIONS = 4  # of a module's change in a layer: the strongest
RIDGE = 0.5  # of the mean variance of embeddings
_BLOCK = 8192  # tokens of the vocabulary at a time

# ------------------------------------------------------------------ written


def unit_unembeddings(model: Model, ids: Any = slice(None)) -> np.ndarray:
    """The unembedding of tokens as unit vectors [K, D]; default: of the whole vocabulary."""
    module = module_table(model.config)[head_path(model.config)]
    # In the orientation of the files, [V, D], tied or not.
    rows = module.turn(parallel.to_host(weight(model.params, module, None)))[ids].astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def written_tokens(model: Model, delta: Delta, table: np.ndarray) -> np.ndarray:
    """How much a diff writes each token of `table` into the residual stream, [K]: see `weight_reading`."""
    changed = dict(modules(delta))
    writers = stream_writers(model.config)
    directions = [_output_directions(changed[path]) for path in writers if path in changed]
    if not directions:
        return np.zeros(len(table))
    return np.abs(np.concatenate(directions) @ table.T).sum(axis=0)


def _output_directions(module: Delta) -> np.ndarray:
    """Unit vectors [L, out]: the direction in which each layer's change moves its output most."""
    if "w" in module:
        change = np.asarray(module["w"], np.float32)
    else:
        a, b = (np.asarray(module[name], np.float32) for name in ("a", "b"))
        if b.shape[1] == 1:
            norms = np.sqrt(squares(b, (1, 2)))[:, 0]
            return (b[:, 0] / np.where(norms > 0, norms, 1)).astype(np.float32)
        # a = q r with orthonormal q, so r b has the right singular vectors of a b, at [R, out].
        change = np.linalg.qr(a, mode="r") @ b
    return np.linalg.svd(change, full_matrices=False)[2][:, 0]


# ------------------------------------------------------------------ read


def whitened_embeddings(model: Model) -> np.ndarray:
    """The embeddings of all tokens [V, D] as a norm hands them on, centred and whitened.

    A finetune moves the input side of a projection along the inputs of its samples, and inputs vary far more in some
    directions than in others. Divided by their covariance, plus a ridge, they are matched filters: what a projection
    learned to react to stands out, not what all tokens share. Vectors have the same length, but those of tokens that
    no training saw, which are short, stay so.
    """
    table = parallel.to_host(weight(model.params, all_modules(model.config)[EMBEDDING], None))
    rows = table.astype(np.float32)
    rows /= np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + model.config.rms_norm_eps)
    rows -= rows.mean(axis=0)
    covariance = (rows.T @ rows / len(rows)).astype(np.float64)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    white = rows @ np.linalg.inv(covariance).astype(np.float32)
    lengths = np.sqrt(np.maximum(np.einsum("vd,vd->v", white, rows), 0))
    white /= np.maximum(lengths, np.median(lengths))[:, None]
    return white


def read_tokens(model: Model, delta: Delta, table: np.ndarray) -> np.ndarray:
    """How much a diff reacts to each token of `table` in the residual stream, [V].

    For every projection that reads the stream in every layer: how far the token's embedding moves its change, in
    units of the root mean square over all tokens. The third powers are summed, so that few large ones count more than
    many small ones.

    Args:
        table: from `whitened_embeddings`.
    """
    sides = [side for side in _input_sides(model, delta) if side.any()]
    if not sides:
        return np.zeros(len(table))
    columns = np.concatenate(
        [side.transpose(1, 0, 2).reshape(len(side[0]), -1) for side in sides], 1
    )
    widths = np.repeat([side.shape[2] for side in sides], [len(side) for side in sides])
    starts = np.cumsum(widths) - widths
    energy = np.concatenate(
        [
            np.add.reduceat(np.square(table[at : at + _BLOCK] @ columns), starts, axis=1)
            for at in range(0, len(table), _BLOCK)
        ]
    )
    mean = energy.mean(axis=0)
    return ((energy / np.where(mean > 0, mean, 1)) ** 1.5).sum(axis=1)


def _input_sides(model: Model, delta: Delta) -> Iterator[np.ndarray]:
    """Of each projection that reads the stream [L, D, r]: its change's strongest input directions, times their sizes.

    As seen from the normed stream before the norm's scales; the largest number of each layer is 1, or all are 0.
    """
    changed, table = dict(modules(delta)), all_modules(model.config)
    for path, norm in stream_readers(model.config).items():
        if path not in changed:
            continue
        scales = parallel.to_host(weight(model.params, table[norm], None)).astype(np.float64)
        side = _sized_inputs(changed[path]) * (scales + model.config.unit_offset_norm)[..., None]
        largest = np.abs(side).max(axis=(1, 2), keepdims=True)
        yield (side / np.where(largest > 0, largest, 1)).astype(np.float32)


def _sized_inputs(module: Delta) -> np.ndarray:
    """The strongest left singular vectors of each layer's change times their singular values, [L, in, r], float64."""
    if "w" in module:  # one layer at a time: a copy of all would take gigabytes
        return np.stack([_strongest(np.asarray(w, np.float64)) for w in module["w"]])
    a, b = (np.asarray(module[name], np.float64) for name in ("a", "b"))
    # b b' = c c', so a c has the left singular vectors and values of a b.
    return np.stack(
        [_strongest(left @ _columns(right @ right.T)) for left, right in zip(a, b, strict=True)]
    )


def _strongest(change: np.ndarray) -> np.ndarray:
    """Of a matrix [in, out], as `_sized_inputs` says."""
    inputs, outputs = change.shape
    if inputs < outputs:
        return _columns(change @ change.T)[:, -DIRECTIONS:]
    vectors: np.ndarray = np.linalg.eigh(change.T @ change)[1]
    return change @ vectors[:, -DIRECTIONS:]


def _columns(gram: np.ndarray) -> np.ndarray:
    """The eigenvectors of a symmetric matrix times the roots of their eigenvalues, the largest last."""
    values, vectors = np.linalg.eigh(gram)
    scaled: np.ndarray = vectors * np.sqrt(np.maximum(values, 0))
    return scaled
