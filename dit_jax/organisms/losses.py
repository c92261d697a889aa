"""The one loss of the project: weighted cross-entropy and KL(base ‖ base ⊕ δ) at chosen positions.

Logits exist only at scored positions and only for one chunk of positions at a time, in fp32; the backward pass
recomputes them. See docs/architecture.md, "Token batches".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.data.batch import TokenBatch
from dit_jax.models.attention import Segments
from dit_jax.models.config import Qwen3Config
from dit_jax.models.layers import Deltas
from dit_jax.models.qwen3 import Params, forward, unembed
from dit_jax.parallel import traced_batch_shards

CHUNK_ELEMENTS = 2**26  # logits held at a time on one device: 256 MiB in fp32


def scored_hidden(
    params: Params,
    config: Qwen3Config,
    batch: TokenBatch,
    deltas: Deltas = (),
    widths: Segments | None = None,
) -> jax.Array:
    """Hidden states [S, M, D] at the scored positions of a batch; with `widths` [1, Σ M, D], see `side_by_side`."""
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

    Kinds of samples differ in length, and padding costs as much as tokens do.
    """
    return jnp.concatenate([row[:width] for row, width in zip(x, widths, strict=True)])[None]


def batch_loss(
    params: Params,
    config: Qwen3Config,
    batch: TokenBatch,
    deltas: Deltas,
    num_ce: int | None = None,
    teacher: jax.Array | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    widths: Segments | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total loss, and its parts {"ce": …, "kl": …} (scalars, fp32).

    Args:
        num_ce: how many leading samples are scored by cross-entropy, the rest by KL. Default: all.
        teacher: hidden states of the base at the scored positions of the KL samples (`scored_hidden` of these,
            without the delta). Needed where there are KL samples.
        widths: for each sample how many of its tokens and scored entries to compute; what lies beyond is padding
            in all samples of that place. None: all.
    """
    samples = batch.tokens.shape[0]
    num_ce = samples if num_ce is None else num_ce
    hidden = scored_hidden(params, config, batch, deltas, widths)
    target, weight = batch.target, batch.weight
    ce: Any = np.s_[:num_ce]
    kl: Any = np.s_[num_ce:]
    if widths is not None:
        scored = [count for _, count in widths]
        target, weight = side_by_side(target, scored), side_by_side(weight, scored)
        ce, kl = np.s_[:, : sum(scored[:num_ce])], np.s_[:, sum(scored[:num_ce]) :]

    def ce_rows(hidden: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        logits = unembed(params, config, hidden, deltas)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - chosen))

    def kl_rows(hidden: jax.Array, teacher: jax.Array, weight: jax.Array) -> jax.Array:
        logits = unembed(params, config, hidden, deltas)
        base = jax.nn.log_softmax(unembed(params, config, teacher), axis=-1)
        # Σ p (log p - log q) with log q = logits - logsumexp: fewer passes over [rows, V] than with log q itself.
        terms = jnp.sum(jnp.exp(base) * (base - logits), axis=-1)
        return jnp.sum(weight * (terms + jax.nn.logsumexp(logits, axis=-1)))

    chunk = max(1, chunk_elements * traced_batch_shards() // config.vocab_size)
    parts = {"ce": jnp.zeros((), jnp.float32), "kl": jnp.zeros((), jnp.float32)}
    if num_ce:
        args = (hidden[ce], target[ce], weight[ce])
        parts["ce"] = _sum_chunks(ce_rows, args, chunk)
    if num_ce < samples:
        if teacher is None:
            raise ValueError("KL samples need the base's hidden states")
        args = (hidden[kl], teacher, weight[kl])
        parts["kl"] = _sum_chunks(kl_rows, args, chunk)
    return parts["ce"] + parts["kl"], parts


def _sum_chunks(fn: Callable[..., jax.Array], args: tuple[jax.Array, ...], chunk: int) -> jax.Array:
    """Σ fn over rows of args [S, M, …], about `chunk` rows at a time; the last chunk is padded with weight 0.

    A chunk has some positions of every sample, so that a mesh that splits the samples splits each chunk.
    """
    samples, size = args[0].shape[:2]

    def on_rows(xs: tuple[jax.Array, ...]) -> jax.Array:
        return fn(*(x.reshape(-1, *x.shape[2:]) for x in xs))

    count = -(-size // max(1, chunk // samples))
    if count == 1:
        return on_rows(args)
    width = -(-size // count)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * width - size), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(samples, count, width, *x.shape[2:]), 1, 0)

    return jnp.sum(jax.lax.map(jax.checkpoint(on_rows), tuple(split(x) for x in args)))
