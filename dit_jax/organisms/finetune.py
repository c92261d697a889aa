"""Finetuning: one weight diff is a scan over optimizer steps; many are its `vmap`, in one compiled program."""

import functools
from typing import Any

import jax
import optax

from dit_jax.data.batch import TokenBatch
from dit_jax.deltas.tree import trainable, with_scale
from dit_jax.errors import DitError
from dit_jax.models.config import Qwen3Config
from dit_jax.models.layers import Delta
from dit_jax.models.qwen3 import Params
from dit_jax.organisms.losses import CHUNK_ELEMENTS, batch_loss, scored_hidden


def make_optimizer(
    name: str,
    learning_rate: float,
    steps: int,
    *,
    warmup_steps: int = 0,
    final_fraction: float = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> optax.GradientTransformation:
    """Adam or AdamW with linear warm-up, then cosine to `final_fraction` of the peak (1.0: constant).

    Raises:
        DitError: another optimizer.
    """
    decay = max(steps - warmup_steps, 1)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, max(warmup_steps, 1)),
            optax.cosine_decay_schedule(learning_rate, decay, final_fraction),
        ],
        [warmup_steps],
    )
    if name == "adam":
        return optax.adam(schedule, *betas)
    if name == "adamw":
        return optax.adamw(schedule, *betas, weight_decay=weight_decay)
    raise DitError(f"unknown optimizer {name!r}: choose 'adam' or 'adamw'")


def finetune(
    params: Params,
    config: Qwen3Config,
    delta: Delta,
    batches: TokenBatch,
    *,
    optimizer: optax.GradientTransformation,
    num_ce: int,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Delta, dict[str, jax.Array]]:
    """Finetunes one delta on `batches`, whose leaves are [steps, S, …] (paper, section 3).

    Gradients exist for the delta alone: the base is a constant of the loss.

    Returns:
        The trained delta, and the losses of each step: {"ce": [steps], "kl": [steps]}, before the update.
    """
    leaves = trainable(delta)
    has_kl = num_ce < batches.tokens.shape[1]

    def step(carry: Any, batch: TokenBatch) -> tuple[Any, dict[str, jax.Array]]:
        leaves, state = carry
        teacher = None
        if has_kl:
            teacher = scored_hidden(params, config, TokenBatch(*(x[num_ce:] for x in batch)))

        def loss(leaves: Delta) -> tuple[jax.Array, dict[str, jax.Array]]:
            deltas = (with_scale(leaves, delta),)
            return batch_loss(params, config, batch, deltas, num_ce, teacher, chunk_elements)

        grads, parts = jax.grad(loss, has_aux=True)(leaves)
        updates, state = optimizer.update(grads, state, leaves)
        return (optax.apply_updates(leaves, updates), state), parts

    (leaves, _), losses = jax.lax.scan(step, (leaves, optimizer.init(leaves)), batches)
    return with_scale(leaves, delta), losses


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "num_ce"), donate_argnames=("deltas",)
)
def finetune_many(
    params: Params,
    config: Qwen3Config,
    deltas: Delta,
    batches: TokenBatch,
    *,
    optimizer: optax.GradientTransformation,
    num_ce: int,
) -> tuple[Delta, dict[str, jax.Array]]:
    """`finetune` for N deltas at once: leaves of `deltas` and `batches` have a leading axis N.

    The base is not mapped, so its products stay one large matmul over all N diffs' tokens.
    """
    # All N diffs hold their chunk of logits at the same time: they share one budget.
    chunk_elements = CHUNK_ELEMENTS // batches.tokens.shape[0]
    one = functools.partial(
        finetune, optimizer=optimizer, num_ce=num_ce, chunk_elements=chunk_elements
    )
    return jax.vmap(lambda delta, batch: one(params, config, delta, batch))(deltas, batches)
