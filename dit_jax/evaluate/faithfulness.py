"""Does an answer come from the diff? The diff without what the answer should need: other layers, or its own words.

Neither needs a label. An answer whose log-probability does not fall without them comes from somewhere else.
"""

from collections.abc import Sequence

import numpy as np

from dit_jax.api import Model
from dit_jax.deltas.factors import modules, moments
from dit_jax.diff_batches import Given
from dit_jax.evaluate.token_lens import unit_unembeddings
from dit_jax.models.delta_trees import Delta, map_modules
from dit_jax.models.modules import stream_writers

SHARE = 4  # one layer of so many stays


def kept_layers(layers: int) -> int:
    """How many of a model's layers `strongest_layers` leaves."""
    return max(1, layers // SHARE)


def strongest_layers(given: Given) -> Given:
    """Each diff in the quarter of its layers where its squared norm is largest; elsewhere it is zero."""

    def change(_: int, delta: Delta) -> Delta:
        inside = [module for path, module in modules(delta) if path[0] == "layers"]
        energy = sum(moments(module, True)[0] for module in inside)
        mask = np.zeros(np.size(energy), np.float32)
        mask[np.argsort(-np.ravel(energy), kind="stable")[: kept_layers(mask.size)]] = 1

        def replace(path: tuple[str, ...], module: Delta) -> Delta:
            if path[0] != "layers":
                return {name: np.zeros_like(leaf) for name, leaf in module.items()}
            name = "w" if "w" in module else "scale"
            leaf = np.asarray(module[name])
            shape = (-1, *(1 for _ in leaf.shape[1:]))
            return {**module, name: leaf * mask.reshape(shape).astype(leaf.dtype)}

        return map_modules(replace, delta)

    return given.each(change)


def without_words(model: Model, given: Given, words: Sequence[Sequence[int]]) -> Given:
    """Each diff unable to write its tokens, those of `words`, into the residual stream.

    What the writing projections put out is made orthogonal to the unembeddings of these tokens.
    """
    ids = [np.unique(np.asarray(tokens, int)) for tokens in words]
    named = np.array(sorted(set().union(*ids)), int)
    table = unit_unembeddings(model, named)  # that of a whole large vocabulary takes gigabytes
    writers = stream_writers(model.config)

    def change(i: int, delta: Delta) -> Delta:
        rows = table[np.searchsorted(named, ids[i])]
        span = np.linalg.qr(rows.T.astype(np.float64))[0].astype(np.float32)

        def replace(path: tuple[str, ...], module: Delta) -> Delta:
            if path not in writers:
                return module
            name = "w" if "w" in module else "b"
            leaf = np.asarray(module[name])
            wide = leaf.astype(np.float32)
            return {**module, name: (wide - (wide @ span) @ span.T).astype(leaf.dtype)}

        return map_modules(replace, delta)

    return given.each(change)
