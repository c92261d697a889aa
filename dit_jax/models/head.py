"""The head: its weight, its logits, and the backward products to hidden states and weight.

Letters beside those of `layers`: E scored entries, the rows of hidden states whose logits are computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Deltas
from dit_jax.models.modules import EMBEDDING, HEAD, Path, module_table
from dit_jax.models.products import precision
from dit_jax.runtime.parallel import FREE, constrain

CHUNK = 1024  # tokens of the vocabulary per product of `to_hidden` on a CPU


def head_path(config: DecoderConfig) -> Path:
    """The module, of the parameters and of a delta, that makes the logits."""
    return EMBEDDING if config.tie_word_embeddings else HEAD


def head_changes(config: DecoderConfig, deltas: Deltas) -> list[jax.Array]:
    """What deltas add to the weight that makes logits, in its orientation.

    A tied head follows a delta's change of the embedding, unless the delta has a change of the head: that unties them.
    """
    found = []
    for delta in deltas:
        if HEAD[0] in delta:
            own = delta[HEAD[0]]["w"]
            found.append(own.T if config.tie_word_embeddings else own)
        elif config.tie_word_embeddings and EMBEDDING[0] in delta:
            found.append(delta[EMBEDDING[0]]["w"])
    return found


def head_weight(params: dict[str, Any], config: DecoderConfig, deltas: Deltas = ()) -> jax.Array:
    """The weight that makes logits, in `config.dtype`: a tied embedding [V, D], else the kernel [D, V]."""
    module = module_table(config)[head_path(config)]
    weight = params[module.path[0]][module.leaf]
    for change in head_changes(config, deltas):
        weight = weight + change.astype(weight.dtype)
    axes = ("vocab", None) if config.tie_word_embeddings else (None, "vocab")
    return constrain(weight.astype(config.dtype), *axes)


def logits(config: DecoderConfig, weight: jax.Array, hidden: jax.Array) -> jax.Array:
    """fp32 logits [..., V] of hidden states [..., D]."""
    product = "...D,VD->...V" if config.tie_word_embeddings else "...D,DV->...V"
    hidden = hidden.astype(config.dtype)
    with precision(config.dtype):
        y = jnp.einsum(product, hidden, weight, preferred_element_type=jnp.float32)
    return constrain(y, *(FREE,) * (y.ndim - 1), "vocab")


def to_hidden(
    config: DecoderConfig, weight: jax.Array, gradient: Callable[[Any, int], jax.Array]
) -> jax.Array:
    """The gradient [E, D] (fp32) of hidden states from that of their logits.

    Args:
        gradient: (first, count) -> the gradient [E, count] of the logits of `count` tokens of the vocabulary.
    """
    dtype = jnp.dtype(config.dtype)

    def product(first: Any, count: int, weight: jax.Array) -> jax.Array:
        equation = "EV,VD->ED" if config.tie_word_embeddings else "EV,DV->ED"
        # Both factors have the dtype of the activations, as in the other products of a backward pass.
        columns = gradient(first, count).astype(dtype)
        with precision(config.dtype):
            return jnp.einsum(equation, columns, weight, preferred_element_type=jnp.float32)

    vocab = config.vocab_size

    def part(first: Any, count: int) -> jax.Array:
        entries = jax.lax.dynamic_slice_in_dim(weight, first, count, axis=0)
        return product(first, count, entries)

    def in_chunks() -> jax.Array:
        last = vocab % CHUNK or CHUNK
        chunks = (vocab - last) // CHUNK
        total = part(vocab - last, last)
        return jax.lax.fori_loop(0, chunks, lambda i, sum_: sum_ + part(i * CHUNK, CHUNK), total)

    def at_once() -> jax.Array:
        return product(0, vocab, weight)

    if config.tie_word_embeddings and dtype == jnp.float32 and prefers_chunks(vocab):
        return jax.lax.platform_dependent(cpu=in_chunks, default=at_once)
    return at_once()


def to_weight(config: DecoderConfig, gradient: jax.Array, hidden: jax.Array) -> jax.Array:
    """The gradient (fp32) of the head's weight, from the gradient [E, V] of the logits of hidden states [E, D]."""
    equation = "EV,ED->VD" if config.tie_word_embeddings else "EV,ED->DV"
    dtype = jnp.dtype(config.dtype)
    with precision(config.dtype):
        return jnp.einsum(
            equation,
            gradient.astype(dtype),
            hidden.astype(dtype),
            preferred_element_type=jnp.float32,
        )


def prefers_chunks(vocab_size: int) -> bool:
    """Whether short sums are faster on a CPU, as for a large vocabulary that is not split over a mesh.

    On a CPU, a product of 151,936 terms per output runs at a third to two thirds of the speed of short ones
    (docs/performance.md). GPUs and TPUs split such sums by themselves.
    """
    return jax.sharding.get_abstract_mesh().empty and vocab_size >= 8 * CHUNK
