"""Quirks of the reference program, for runs that must agree with it number by number (docs/formats.md).

This project's defaults differ on purpose: a diff should not depend on the other diffs of its batch, and padding should
not be learned.
"""

from collections.abc import Sequence

import numpy as np

from dit_jax.data.batch import Sample, TokenBatch, pack


def couple_losses(
    batch: TokenBatch, factors: Sequence[float], num_ce: int, diffs: int | None = None
) -> TokenBatch:
    """Turns batches of N diffs, leaves [N, steps, S, …], into what the reference optimizes.

    It takes the mean over the tokens of all diffs of a batch, and masks the KL terms by the unshifted label mask, which
    scores the distribution after each target instead of the one that predicts it.

    Args:
        factors: [S], the factor of each sample's loss: 3 λ / Σ λ.
        num_ce: how many leading samples are scored by cross-entropy.
        diffs: how many of the N belong to the batch (default all); the others fill up a shard.
    """
    used = (np.asarray(batch.weight) > 0).astype(np.float32)
    counts = used[:diffs].sum(axis=(0, -1), keepdims=True)
    weight = used / np.maximum(counts, 1) * np.asarray(factors, np.float32)[:, None]
    position = np.array(batch.position)
    position[:, :, num_ce:] += (used[:, :, num_ce:] > 0).astype(position.dtype)
    return batch._replace(position=position, weight=weight.astype(np.float32))


def padded_labels(samples: Sequence[Sample], length: int, pad_id: int) -> TokenBatch:
    """An adapter batch whose labels mask only the prompt, so that the padding up to `length` is predicted too.

    The loss is the mean over all scored tokens of the batch. Attention ignores padding, as everywhere.
    """
    stretched = [
        Sample((*sample.tokens, *[pad_id] * (length - len(sample.tokens))), sample.start, length)
        for sample in samples
    ]
    total = sum(sample.end - sample.start for sample in stretched)
    scored = max(sample.end - sample.start for sample in stretched)
    batch = pack(stretched, [1 / total] * len(samples), length, scored, pad_id)
    return batch._replace(lengths=np.asarray([len(sample.tokens) for sample in samples], np.int32))
