"""Weighted cross-entropy and KL of hidden states under a frozen head.

Logits exist for one chunk of scored entries at a time, and their gradient is taken back to the hidden states while
they are there: nothing of [entries, V] is kept for the backward pass, and nothing is computed twice. Entries of many
diffs (`vmap`) share one product with the head, without those that no sample uses.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax import parallel
from dit_jax.models import head
from dit_jax.models.config import Qwen3Config


class Scored(NamedTuple):
    """Entries of S samples, at most M each: hidden [S, M, D] and weight [S, M] (0: not used), against
    target tokens [S, M] int32 (cross-entropy), or against the base's hidden states [S, M, D] (KL)."""

    hidden: jax.Array
    against: jax.Array
    weight: jax.Array


class Options(NamedTuple):
    """How to compute; static.

    chunk: rows of logits held at a time on one device.
    packed: at most so many entries for cross-entropy and for KL are used in all, over all diffs of a `vmap`; the
    others are left out of the products. None: not known. What it says must be true.
    """

    config: Qwen3Config
    chunk: int
    packed: tuple[int, int] | None = None


class Head(NamedTuple):
    """weight: see `models.head.head_weight`. base: that of the base, where the delta changes the head."""

    weight: jax.Array
    base: jax.Array | None


Groups = tuple[Scored | None, Scored | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    options: Options, head_: Head, ce: Scored | None, kl: Scored | None
) -> tuple[jax.Array, jax.Array]:
    """Σ weight · cross-entropy and Σ weight · KL(base ‖ changed), fp32 scalars; gradients go to `hidden` alone."""
    return _batched(options, False)(head_, (ce, kl))[0]


def _forward(options: Options, head_: Head, ce: Scored | None, kl: Scored | None) -> Any:
    return _batched(options, True)(head_, (ce, kl))


def _backward(_: Options, gradients: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    def one(gradient: jax.Array | None, cotangent: jax.Array) -> Scored | None:
        if gradient is None:
            return None
        scaled = (cotangent * gradient).astype(gradient.dtype)
        return Scored(scaled, None, None)  # type: ignore[arg-type]

    return (None, *(one(*pair) for pair in zip(gradients, cotangents, strict=True)))


head_loss.defvjp(_forward, _backward)


def _batched(options: Options, gradient: bool) -> Any:
    """(head, groups) -> (losses, gradients or None); under `vmap` one computation for all diffs."""

    def alone(head_: Head, groups: Groups) -> Any:
        out = _many(options, gradient, head_, jax.tree.map(lambda x: x[None], groups))
        return jax.tree.map(lambda x: x[0], out)

    # On a mesh the diffs of a `vmap` lie on different devices: each computes its own.
    if parallel.spmd_axes() is not None:
        return alone
    compute = jax.custom_batching.custom_vmap(alone)

    @compute.def_vmap
    def together(size: int, batched: Any, head_: Head, groups: Groups) -> Any:
        def stack(x: jax.Array, has: bool) -> jax.Array:
            return x if has else jnp.broadcast_to(x, (size, *x.shape))

        if any(jax.tree.leaves(batched[0])):  # a head for each diff
            out = jax.vmap(alone)(
                jax.tree.map(stack, head_, batched[0]), jax.tree.map(stack, groups, batched[1])
            )
        else:
            out = _many(options, gradient, head_, jax.tree.map(stack, groups, batched[1]))
        return out, jax.tree.map(lambda _: True, out)

    return compute


def _many(options: Options, gradient: bool, head_: Head, groups: Groups) -> Any:
    """Losses [N] and gradients [N, S, M, D] of groups with leaves [N, S, M, …]."""
    shapes = [None if group is None else group.weight.shape for group in groups]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)
    limits = options.packed or (None, None)
    packed, restores = zip(*map(_pack, flat, limits), strict=True)
    out = _chunks(options, gradient, head_, packed)
    losses: list[jax.Array | None] = []
    gradients: list[jax.Array | None] = []
    for shape, restore, found in zip(shapes, restores, out, strict=True):
        if shape is None:
            losses.append(None)
            gradients.append(None)
            continue
        terms, slope = jax.tree.map(restore, found)
        losses.append(terms.reshape(shape[0], -1).sum(axis=1))
        gradients.append(None if slope is None else slope.reshape(*shape, -1))
    count = next(shape[0] for shape in shapes if shape is not None)
    zero = jnp.zeros((count,), jnp.float32)
    return tuple(zero if x is None else x for x in losses), tuple(gradients)


def _pack(group: Scored | None, count: int | None) -> tuple[Scored | None, Any]:
    """The used entries of a group first, [1, count, …], and the way back of what is computed for them."""
    if group is None or count is None or count >= group.weight.size:
        return group, lambda y: y
    shape = group.weight.shape
    used = group.weight.reshape(-1) != 0
    order = jnp.argsort(~used, stable=True)[:count]
    place = jnp.minimum(jnp.cumsum(used) - used, count - 1)

    def restore(y: jax.Array) -> jax.Array:
        y = y.reshape(count, *y.shape[2:])
        kept = used.reshape(-1, *(1,) * (y.ndim - 1))
        return jnp.where(kept, y[place], 0).reshape(*shape, *y.shape[1:])

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order][None], group), restore


def _chunks(options: Options, gradient: bool, head_: Head, groups: Groups) -> list[Any]:
    """For both groups, leaves [S, M, …]: (terms [S, M], gradients [S, M, D] or None)."""
    ce, kl = groups
    rows = functools.partial(_rows, options.config, gradient, head_)

    def on(ce: Scored | None, kl: Scored | None) -> list[Any]:
        found = rows(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (ce, kl)))

        def shaped(group: Scored | None, out: Any) -> Any:
            if group is None:
                return None
            return jax.tree.map(lambda y: y.reshape(*group.weight.shape, *y.shape[1:]), out)

        return [shaped(*pair) for pair in zip((ce, kl), found, strict=True)]

    def size(group: Scored | None) -> int:
        return 0 if group is None else group.weight.size

    if size(ce) + 2 * size(kl) <= options.chunk:
        return on(ce, kl)
    return [
        _map_chunks(lambda part: on(part, None)[0], ce, options.chunk),
        _map_chunks(lambda part: on(None, part)[1], kl, options.chunk // 2),
    ]


def _map_chunks(fn: Any, group: Scored | None, chunk: int) -> Any:
    """fn over entries [S, M, …], about `chunk` of them at a time; the last chunk is padded with weight 0.

    A chunk has some entries of every sample, so that a mesh that splits the samples splits each chunk.
    """
    if group is None:
        return None
    samples, entries = group.weight.shape
    count = -(-entries // max(1, chunk // samples))
    if count == 1:
        return fn(group)
    width = -(-entries // count)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * width - entries), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(samples, count, width, *x.shape[2:]), 1, 0)

    def join(y: jax.Array) -> jax.Array:
        return jnp.moveaxis(y, 0, 1).reshape(samples, count * width, *y.shape[3:])[:, :entries]

    return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(split, group)))


def _rows(
    config: Qwen3Config, gradient: bool, head_: Head, ce: Scored | None, kl: Scored | None
) -> list[Any]:
    """(terms [R], gradients [R, D] or None) of both groups, leaves [R, …], by one product with the head."""
    sizes = [0 if group is None else len(group.weight) for group in (ce, kl)]
    split, rows = sizes[0], sum(sizes)
    hidden = [group.hidden for group in (ce, kl) if group is not None]
    teacher = [] if kl is None else [kl.against.astype(hidden[0].dtype)]
    if head_.base is None:
        logits = head.logits(config, head_.weight, jnp.concatenate(hidden + teacher))
    else:
        logits = head.logits(config, head_.weight, jnp.concatenate(hidden))
        base = [head.logits(config, head_.base, x) for x in teacher]
        logits = jnp.concatenate([logits, *base])
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    found: list[Any] = [None, None]
    if ce is not None:
        target = ce.against[:, None]
        chosen = jnp.take_along_axis(logits[:split], target, axis=-1)
        found[0] = ce.weight * (norm[:split] - chosen)[:, 0]
    if kl is not None:
        student, of_base = logits[split:rows], logits[rows:] - norm[rows:]
        # Σ p (log p - log q) with log q = logits - norm: fewer passes over [R, V] than with log q itself.
        terms = jnp.sum(jnp.exp(of_base) * (of_base - student), axis=-1)
        found[1] = kl.weight * (terms + norm[split:rows, 0])
    if not gradient:
        return [None if terms is None else (terms, None) for terms in found]

    def slopes(first: Any, count: int) -> jax.Array:
        """Of so many vocabulary entries' logits: weight · (probability - wanted probability)."""
        columns = jax.lax.dynamic_slice_in_dim(logits, first, count, axis=1)
        ours = jnp.exp(columns[:rows] - norm[:rows])
        parts = []
        if ce is not None:
            is_target = ce.against[:, None] == first + jnp.arange(count)
            parts.append(ce.weight[:, None] * (ours[:split] - is_target))
        if kl is not None:
            wanted = jnp.exp(columns[rows:] - norm[rows:])
            parts.append(kl.weight[:, None] * (ours[split:] - wanted))
        return jnp.concatenate(parts)

    slope = head.to_hidden(config, head_.weight, slopes).astype(hidden[0].dtype)
    slopes_of = (slope[:split], slope[split:])
    return [
        None if terms is None else (terms, part)
        for terms, part in zip(found, slopes_of, strict=True)
    ]
