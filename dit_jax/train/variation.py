"""Training diffs that are changed at random: what names a topic should not hang on one layer, or on the diff's size.

Augmentation of weights as inputs: Shamsian et al. 2024 (arXiv 2402.04081).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.models.delta_trees import Delta, map_modules
from dit_jax.train.train_keys import TRAIN


def vary(diffs: Delta, seeds: Sequence[int], train: Any) -> Delta:
    """Each diff with every projection of every layer multiplied by a number of its own, or left out.

    The number is the product of a lognormal one for the diff (`train.vary_size`) and one for the layer
    (`train.vary_layers`). `train.drop_share` of the projections get 0, and the others more, as in dropout: whole diffs
    would look larger than those of the training, and fewer benign ones would be called none.

    Args:
        diffs: leaves [n, L, …] on the host.
        seeds: [n], of the random numbers of each example, wherever it is computed.
    """
    size, layers, drop = (
        TRAIN.get(train, key) for key in ("vary_size", "vary_layers", "drop_share")
    )
    if not (size or layers or drop):
        return diffs
    drawn = [np.random.default_rng(seed) for seed in seeds]
    count = jax.tree.leaves(diffs)[0].shape[1]  # only layers have changes of each example
    logs = [size * rng.normal() + layers * rng.normal(size=count) for rng in drawn]
    of_layers = np.exp(np.stack(logs)) / (1 - drop)

    def change(_: tuple[str, ...], module: Delta) -> Delta:
        name = "scale" if "scale" in module else "w"
        leaf = module[name]
        kept = np.stack([rng.random(count) >= drop for rng in drawn])
        factor = (of_layers * kept).reshape(*leaf.shape[:2], *[1] * (leaf.ndim - 2))
        return {**module, name: (leaf * factor).astype(leaf.dtype)}

    return map_modules(change, diffs)
