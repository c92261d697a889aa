"""Direct preference optimization: Rafailov et al. 2023 (arXiv 2305.18290), equation 7."""

import jax
import jax.numpy as jnp

from dit_jax.data.batch import TokenBatch
from dit_jax.models.decoder import Params, unembed
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Deltas
from dit_jax.optimize.batch_loss import scored_hidden


def preference_loss(
    params: Params, config: DecoderConfig, batch: TokenBatch, deltas: Deltas, beta: float
) -> jax.Array:
    """Mean −log σ(β (r(better) − r(worse))) of P pairs, r = log p(base ⊕ deltas) − log p(base) of a whole answer.

    Args:
        batch: 2 P samples, the better answers first, and the worse ones in the same order.
    """
    gained = _log_probs(params, config, batch, deltas) - _log_probs(params, config, batch, ())
    better, worse = jnp.split(gained, 2)
    return -jnp.mean(jax.nn.log_sigmoid(beta * (better - worse)))


def _log_probs(
    params: Params, config: DecoderConfig, batch: TokenBatch, deltas: Deltas
) -> jax.Array:
    """log p of the scored tokens of each sample, [S]. The logits of all scored positions are held at once."""
    logits = unembed(params, config, scored_hidden(params, config, batch, deltas), deltas)
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1), batch.target[..., None], axis=-1
    )
    return jnp.sum(jnp.where(batch.weight > 0, chosen[..., 0], 0.0), axis=1)
