"""Token batches: which positions are scored against which targets, for diffs and adapters alike."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dit_jax.errors import DitError
from dit_jax.runtime.sizes import next_multiple, next_power

# numpy where batches are made, jax inside compiled functions.
Array = Any


class TokenBatch(NamedTuple):
    """S right-padded samples of at most T tokens, with at most M scored positions each.

    tokens [S, T] int32, lengths [S] int32, position [S, M] int32 (whose logits are scored),
    target [S, M] int32, weight [S, M] float32 (0 at unused entries). There may be more leading axes.
    """

    tokens: Array
    lengths: Array
    position: Array
    target: Array
    weight: Array


class Sample(NamedTuple):
    """One tokenized example: ids, of which those from `start` to before `end` are scored by the logits before them."""

    tokens: Sequence[int]
    start: int
    end: int


def pack(
    samples: Sequence[Sample],
    weights: Sequence[float],
    length: int,
    scored: int,
    pad_id: int,
    widths: Sequence[tuple[int, int]] | None = None,
) -> TokenBatch:
    """Pads samples to [S, length] and [S, scored]; weights[s] is the weight of every scored token of sample s.

    Args:
        widths: for each sample, how many tokens and scored tokens it may have; default: `length` and `scored`.

    Raises:
        DitError: a sample does not fit.
    """
    count = len(samples)
    tokens = np.full((count, length), pad_id, np.int32)
    lengths = np.zeros((count,), np.int32)
    position = np.zeros((count, scored), np.int32)
    target = np.zeros((count, scored), np.int32)
    weight = np.zeros((count, scored), np.float32)
    for row, sample in enumerate(samples):
        size, terms = len(sample.tokens), sample.end - sample.start
        most, most_scored = widths[row] if widths else (length, scored)
        if size > most or terms > most_scored:
            keys = "train.max_length and train.max_target"
            if widths:  # samples of a finetune
                keys = "diffs.max_length, diffs.max_target and its kind's diffs.widths"
            raise DitError(
                f"a sample of {size} tokens ({terms} scored) does not fit into {most} ({most_scored} scored): "
                f"raise {keys}"
            )
        tokens[row, :size] = sample.tokens
        lengths[row] = size
        position[row, :terms] = np.arange(sample.start - 1, sample.end - 1)
        target[row, :terms] = sample.tokens[sample.start : sample.end]
        weight[row, :terms] = weights[row]
    return TokenBatch(tokens, lengths, position, target, weight)


def stack(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Batches of equal shape joined on a new leading axis."""
    return TokenBatch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))


def used_entries(batches: TokenBatch, num_ce: int) -> tuple[int, int]:
    """The most entries with a weight in one step: of the leading `num_ce` samples, and of the others.

    Args:
        batches: on the host, leaves [N, steps, S, …]; the entries of a step are summed over N.
    """
    used = np.asarray(batches.weight) != 0
    ce, kl = (part.sum(axis=(0, 2, 3)).max() for part in (used[:, :, :num_ce], used[:, :, num_ce:]))
    return int(ce), int(kl)


def entry_limit(batches: TokenBatch, num_ce: int, room: float) -> tuple[int, int]:
    """`room` (1.03: 3 % more) times the entries that these batches use, rounded up.

    There are few sizes (steps of at most 1/32), so that other diffs and other seeds run the same program.
    """

    def rounded(size: int) -> int:
        return next_multiple(size, max(16, next_power(size + 1) // 64))

    ce, kl = (rounded(int(room * used)) for used in used_entries(batches, num_ce))
    return ce, kl


def fits(batches: TokenBatch, num_ce: int, limit: tuple[int, int] | None) -> bool:
    """Whether these batches use no more entries than `limit`."""
    return limit is not None and all(
        used <= most for used, most in zip(used_entries(batches, num_ce), limit, strict=True)
    )
