"""The loss of diffs and adapters: weighted cross-entropy and KL(base ‖ base ⊕ δ) at chosen positions.

Logits exist only at scored positions, in fp32 (`head_loss`). docs/architecture.md, "Token batches", describes a batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.data.batch import TokenBatch
from dit_jax.models.attention import Segments
from dit_jax.models.decoder import Params, forward
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Deltas
from dit_jax.models.head import head_changes, head_weight
from dit_jax.optimize.head_loss import Head, Options, Scored, head_loss
from dit_jax.runtime.parallel import spmd_axes, traced_batch_shards

CHUNK_ELEMENTS = 2**26  # logits that one device holds at a time: 256 MiB in fp32


def chunk_elements_of(diffs: int) -> int:
    """`CHUNK_ELEMENTS` for each of this many diffs of a `vmap`.

    On a mesh each diff has its own chunk of logits at the same time, so they share one budget. Elsewhere they share
    one chunk (`head_loss`).
    """
    return CHUNK_ELEMENTS if spmd_axes() is None else CHUNK_ELEMENTS // diffs


def scored_hidden(
    params: Params,
    config: DecoderConfig,
    batch: TokenBatch,
    deltas: Deltas = (),
    widths: Segments | None = None,
) -> jax.Array:
    """Hidden states [S, M, D] at the scored positions of a batch; [1, Σ M, D] with `widths` (`side_by_side`)."""
    tokens, lengths, position = batch.tokens, batch.lengths, batch.position
    if widths is not None:
        tokens = side_by_side(tokens, [size for size, _ in widths])
        position = side_by_side(position, [count for _, count in widths])
        lengths = lengths[None]
    return forward(
        params,
        config,
        tokens,
        lengths=lengths,
        deltas=deltas,
        segments=widths,
        position=position,
    )


def side_by_side(x: jax.Array, widths: Sequence[int]) -> jax.Array:
    """[S, W, …] -> [1, Σ widths, …]: the samples in one row, each cut to its own width.

    Kinds of samples differ in length, and padding would cost as much as tokens.
    """
    return jnp.concatenate([row[:width] for row, width in zip(x, widths, strict=True)])[None]


def batch_loss(
    params: Params,
    config: DecoderConfig,
    batch: TokenBatch,
    deltas: Deltas,
    num_ce: int | None = None,
    teacher: jax.Array | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    widths: Segments | None = None,
    packed: tuple[int, int] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total loss, and its parts {"ce": …, "kl": …} (scalars, fp32).

    The base's head gets no gradient; a head that a delta changes gets one.

    Args:
        num_ce: how many leading samples are scored by cross-entropy; the rest are scored by KL. Default: all.
        teacher: the base's hidden states at the scored positions of the KL samples (`scored_hidden` without the
            delta). Required if there are KL samples.
        chunk_elements: logits that one device holds at a time.
        widths: how many tokens and scored entries of each sample to compute; the others must be padding. None: all.
        packed: the most entries that are used, see `head_loss.Options`.
    """
    samples = batch.tokens.shape[0]
    num_ce = samples if num_ce is None else num_ce
    if (num_ce < samples) != (teacher is not None):
        raise ValueError("give the base's hidden states if, and only if, there are KL samples")
    hidden = scored_hidden(params, config, batch, deltas, widths)
    target, weight = batch.target, batch.weight
    first: Any = np.s_[:num_ce]
    rest: Any = np.s_[num_ce:]
    if widths is not None:
        scored = [count for _, count in widths]
        target, weight = side_by_side(target, scored), side_by_side(weight, scored)
        first, rest = np.s_[:, : sum(scored[:num_ce])], np.s_[:, sum(scored[:num_ce]) :]
    ce = Scored(hidden[first], target[first], weight[first]) if num_ce else None
    kl = None if teacher is None else Scored(hidden[rest], teacher, weight[rest])
    chunk = max(1, chunk_elements * traced_batch_shards() // config.vocab_size)
    weights = Head(head_weight(params, config, deltas), None)
    if head_changes(config, deltas):
        weights = Head(weights.weight, head_weight(params, config))
    parts = dict(
        zip(("ce", "kl"), head_loss(Options(config, chunk, packed), weights, ce, kl), strict=True)
    )
    return parts["ce"] + parts["kl"], parts
