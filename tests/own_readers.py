"""A reader as users write it, named by its import path `own_readers:size`."""

import jax
import numpy as np


def size(base, diff, question):
    """Says the size of a diff, and what it was asked about which base."""
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(diff)))
    return f"{base.name} | {question} | {norm:.4f}"


def number(base, diff, question):
    """An answer that is no text."""
    return 7
