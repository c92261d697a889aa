"""Finetuning: one weight diff is a scan over optimizer steps; many diffs are its `vmap` in one compiled program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.data.batch import TokenBatch
from dit_jax.deltas.tree import trainable, with_scale
from dit_jax.models import shardings
from dit_jax.models.attention import Segments
from dit_jax.models.decoder import Params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, Deltas
from dit_jax.optimize.batch_loss import (
    CHUNK_ELEMENTS,
    batch_loss,
    chunk_elements_of,
    scored_hidden,
    side_by_side,
)
from dit_jax.optimize.preference_loss import preference_loss
from dit_jax.organisms.teacher import Teacher
from dit_jax.runtime import parallel


def finetune(
    params: Params,
    config: DecoderConfig,
    delta: Delta,
    batches: TokenBatch,
    *,
    optimizer: optax.GradientTransformation,
    num_ce: int,
    teacher: Teacher | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    widths: Segments | None = None,
    packed: tuple[int, int] | None = None,
    beta: float = 0.0,
) -> tuple[Delta, dict[str, jax.Array]]:
    """Finetunes one delta on `batches`, whose leaves are [steps, S, …] (paper, section 3).

    Only the delta has gradients; the base is a constant of the loss.

    Args:
        teacher: the base's hidden states for the KL samples. None: every step computes them.
        widths: (tokens, scored entries) of each of the S samples of a step, beyond which there is only padding; the
            samples then lie side by side in one row. None: S rows.
        packed: the most entries of a step that are used, see `head_loss.Options`.
        beta: if not 0, the `num_ce` samples are pairs, see `preference_loss`; without widths.

    Returns:
        The trained delta, and the losses of each step before its update: {"ce": [steps], "kl": [steps]}.
    """
    leaves = trainable(delta)
    has_kl = num_ce < batches.tokens.shape[1]

    def step(carry: Any, inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        leaves, state = carry
        batch, rows = inputs
        base = None
        kl_widths = None if widths is None else widths[num_ce:]
        if teacher is not None:
            base = teacher.hidden[rows]
            if kl_widths is not None:
                base = side_by_side(base, [count for _, count in kl_widths])
        elif has_kl:
            kl_samples = TokenBatch(*(x[num_ce:] for x in batch))
            base = scored_hidden(params, config, kl_samples, widths=kl_widths)

        def loss(leaves: Delta) -> tuple[jax.Array, dict[str, jax.Array]]:
            deltas = (with_scale(leaves, delta),)
            if beta:
                return _paired_loss(
                    params, config, batch, deltas, num_ce, base, beta, chunk_elements
                )
            return batch_loss(
                params, config, batch, deltas, num_ce, base, chunk_elements, widths, packed
            )

        grads, parts = jax.grad(loss, has_aux=True)(leaves)
        updates, state = optimizer.update(grads, state, leaves)
        return (optax.apply_updates(leaves, updates), state), parts

    rows = None if teacher is None else teacher.rows
    (leaves, _), losses = jax.lax.scan(step, (leaves, optimizer.init(leaves)), (batches, rows))
    return with_scale(leaves, delta), losses


def _paired_loss(
    params: Params,
    config: DecoderConfig,
    batch: TokenBatch,
    deltas: Deltas,
    paired: int,
    base: jax.Array | None,
    beta: float,
    chunk_elements: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The preference loss of the first `paired` samples, as the part "ce", and the KL of the others."""
    first, rest = (
        TokenBatch(*(x[part] for x in batch)) for part in (np.s_[:paired], np.s_[paired:])
    )
    preferred = preference_loss(params, config, first, deltas, beta)
    if base is None:
        return preferred, {"ce": preferred, "kl": jnp.zeros_like(preferred)}
    kl, _ = batch_loss(params, config, rest, deltas, 0, base, chunk_elements)
    return preferred + kl, {"ce": preferred, "kl": kl}


@functools.partial(
    jax.jit,
    static_argnames=("config", "optimizer", "num_ce", "widths", "packed", "beta"),
    donate_argnames=("deltas",),
)
def finetune_many(
    params: Params,
    config: DecoderConfig,
    deltas: Delta,
    batches: TokenBatch,
    *,
    optimizer: optax.GradientTransformation,
    num_ce: int,
    teacher: Teacher | None = None,
    widths: Segments | None = None,
    packed: tuple[int, int] | None = None,
    beta: float = 0.0,
) -> tuple[Delta, dict[str, jax.Array]]:
    """`finetune` for N deltas at once: leaves of `deltas` and `batches` have a leading axis N.

    The base is not mapped, so that its products stay large matmuls over the tokens of all N diffs. On a mesh N is split
    over data and fsdp; no diff depends on another.

    Args:
        deltas: donated, so their arrays are gone afterwards; copy what is still needed.
        optimizer: compared by identity; make it once before the loop, since each new one compiles again.
    """
    chunk_elements = chunk_elements_of(batches.tokens.shape[0])

    def one(delta: Delta, batch: TokenBatch, teacher: Teacher | None) -> Any:
        return finetune(
            params,
            config,
            delta,
            batch,
            optimizer=optimizer,
            num_ce=num_ce,
            teacher=teacher,
            chunk_elements=chunk_elements,
            widths=widths,
            packed=packed,
            beta=beta,
        )

    # All diffs share the table of hidden states, and each has its own rows in it.
    in_axes = (0, 0, None if teacher is None else Teacher(hidden=None, rows=0))
    many = parallel.vmap_diffs(one, in_axes)
    trained, losses = many(deltas, batches, teacher)
    return shardings.constrain_delta(config, trained, batch_axis=0), losses
