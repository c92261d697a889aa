"""The one loss of the project: weighted cross-entropy and KL(base ‖ base ⊕ δ) at chosen positions.

Logits exist only at scored positions and only for one chunk of positions at a time, in fp32; the backward pass
recomputes them. See docs/architecture.md, "Token batches".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dit_jax.data.batch import TokenBatch
from dit_jax.models.config import Qwen3Config
from dit_jax.models.layers import Deltas
from dit_jax.models.qwen3 import Params, forward, unembed
from dit_jax.parallel import traced_batch_shards

CHUNK_ELEMENTS = 2**26  # logits held at a time on one device: 256 MiB in fp32


def scored_hidden(
    params: Params, config: Qwen3Config, batch: TokenBatch, deltas: Deltas = ()
) -> jax.Array:
    """Hidden states [S, M, D] at the scored positions of a batch."""
    hidden = forward(params, config, batch.tokens, lengths=batch.lengths, deltas=deltas)
    return jnp.take_along_axis(hidden, batch.position[..., None], axis=1)


def batch_loss(
    params: Params,
    config: Qwen3Config,
    batch: TokenBatch,
    deltas: Deltas,
    num_ce: int | None = None,
    teacher: jax.Array | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total loss, and its parts {"ce": …, "kl": …} (scalars, fp32).

    Args:
        num_ce: how many leading samples are scored by cross-entropy, the rest by KL. Default: all.
        teacher: hidden states [S - num_ce, M, D] of the base at the scored positions of the KL samples
            (`scored_hidden` without the delta). Needed where there are KL samples.
    """
    num_ce = batch.tokens.shape[0] if num_ce is None else num_ce
    hidden = scored_hidden(params, config, batch, deltas)

    def ce_rows(hidden: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        logits = unembed(params, config, hidden, deltas)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - chosen))

    def kl_rows(hidden: jax.Array, teacher: jax.Array, weight: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(unembed(params, config, hidden, deltas), axis=-1)
        base = jax.nn.log_softmax(unembed(params, config, teacher), axis=-1)
        return jnp.sum(weight * jnp.sum(jnp.exp(base) * (base - logp), axis=-1))

    ce, kl = slice(None, num_ce), slice(num_ce, None)
    chunk = max(1, chunk_elements * traced_batch_shards() // config.vocab_size)
    parts = {"ce": jnp.zeros((), jnp.float32), "kl": jnp.zeros((), jnp.float32)}
    if num_ce:
        args = (hidden[ce], batch.target[ce], batch.weight[ce])
        parts["ce"] = _sum_chunks(ce_rows, args, chunk)
    if num_ce < batch.tokens.shape[0]:
        if teacher is None:
            raise ValueError("KL samples need the base's hidden states")
        args = (hidden[kl], teacher, batch.weight[kl])
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
