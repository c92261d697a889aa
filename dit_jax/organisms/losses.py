"""The one loss of the project: weighted cross-entropy and KL(base ‖ base ⊕ δ) at chosen positions.

Logits exist only at scored positions and only for one chunk of rows at a time, in fp32; the backward pass
recomputes them. See docs/architecture.md, "Token batches".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dit_jax.data.batch import TokenBatch
from dit_jax.models.config import Qwen3Config
from dit_jax.models.layers import Deltas
from dit_jax.models.qwen3 import Params, forward, unembed

CHUNK_ELEMENTS = 2**26  # logits held at a time: 256 MiB in fp32


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

    def rows(x: jax.Array, part: slice) -> jax.Array:
        x = x[part]
        return x.reshape(-1, *x.shape[2:])

    def ce_rows(hidden: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
        logits = unembed(params, config, hidden, deltas)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - chosen))

    def kl_rows(hidden: jax.Array, teacher: jax.Array, weight: jax.Array) -> jax.Array:
        logp = jax.nn.log_softmax(unembed(params, config, hidden, deltas), axis=-1)
        base = jax.nn.log_softmax(unembed(params, config, teacher), axis=-1)
        return jnp.sum(weight * jnp.sum(jnp.exp(base) * (base - logp), axis=-1))

    ce, kl = slice(None, num_ce), slice(num_ce, None)
    chunk = max(1, chunk_elements // config.vocab_size)
    parts = {"ce": jnp.zeros((), jnp.float32), "kl": jnp.zeros((), jnp.float32)}
    if num_ce:
        args = (rows(hidden, ce), rows(batch.target, ce), rows(batch.weight, ce))
        parts["ce"] = _sum_chunks(ce_rows, args, chunk)
    if num_ce < batch.tokens.shape[0]:
        if teacher is None:
            raise ValueError("KL samples need the base's hidden states")
        args = (rows(hidden, kl), teacher.reshape(-1, teacher.shape[-1]), rows(batch.weight, kl))
        parts["kl"] = _sum_chunks(kl_rows, args, chunk)
    return parts["ce"] + parts["kl"], parts


def _sum_chunks(fn: Callable[..., jax.Array], args: tuple[jax.Array, ...], chunk: int) -> jax.Array:
    """Σ fn over chunks of rows; the last chunk is padded with rows of weight 0."""
    size = args[0].shape[0]
    count = -(-size // chunk)
    if count == 1:
        return fn(*args)
    chunk = -(-size // count)
    padded = tuple(
        jnp.pad(x, ((0, count * chunk - size), *((0, 0),) * (x.ndim - 1))).reshape(
            count, chunk, *x.shape[1:]
        )
        for x in args
    )
    return jnp.sum(jax.lax.map(jax.checkpoint(lambda x: fn(*x)), padded))
