"""Weighted cross-entropy and KL of hidden states under a head.

Logits exist for one chunk of scored entries at a time, and their gradient with respect to the hidden states is computed
with them. So nothing of shape [entries, V] is kept for the backward pass, and nothing is computed twice. The entries of
many diffs (`vmap`) share one product with the base's head, which leaves out entries that no sample uses.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.models import head
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.runtime import parallel


class Scored(NamedTuple):
    """Entries of S samples, at most M each: hidden [S, M, D] and weight [S, M] (0: not used), scored against
    target tokens [S, M] int32 (cross-entropy) or against the base's hidden states [S, M, D] (KL)."""

    hidden: jax.Array
    against: jax.Array
    weight: jax.Array


class Options(NamedTuple):
    """How to compute; static.

    chunk: rows of logits that one device holds at a time.
    packed: the most entries that are used for cross-entropy and for KL, over all diffs of a `vmap`; the products leave
    out the others. It must be true; None: not known.
    """

    config: DecoderConfig
    chunk: int
    packed: tuple[int, int] | None = None


class Head(NamedTuple):
    """weight: see `models.head.head_weight`. base: the base's weight, if a delta changes the head.

    Only a changed head has a gradient, since the base is frozen.
    """

    weight: jax.Array
    base: jax.Array | None


class Found(NamedTuple):
    """One kind of loss: its terms [S, M], and the gradients of their sum for hidden states [S, M, D] and the weight."""

    terms: jax.Array
    hidden: jax.Array | None
    weight: jax.Array | None


Groups = tuple[Scored | None, Scored | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    options: Options, head_: Head, ce: Scored | None, kl: Scored | None
) -> tuple[jax.Array, jax.Array]:
    """Σ weight · cross-entropy and Σ weight · KL(base ‖ changed), fp32 scalars.

    `hidden` and the weight of a changed head have gradients.
    """
    return _batched(options, False)(head_, (ce, kl))[0]


def _forward(options: Options, head_: Head, ce: Scored | None, kl: Scored | None) -> Any:
    return _batched(options, True)(head_, (ce, kl))


def _backward(_: Options, gradients: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    def scored(gradient: jax.Array | None, cotangent: jax.Array) -> Scored | None:
        if gradient is None:
            return None
        scaled = (cotangent * gradient).astype(gradient.dtype)
        return Scored(scaled, None, None)  # type: ignore[arg-type]

    of_hidden, of_weight = gradients
    weights = [c * x for x, c in zip(of_weight, cotangents, strict=True) if x is not None]
    head_ = Head(sum(weights).astype(weights[0].dtype), None) if weights else None
    return (head_, *map(scored, of_hidden, cotangents))


head_loss.defvjp(_forward, _backward)


def _batched(options: Options, gradient: bool) -> Any:
    """(head, groups) -> (losses, gradients or None); under `vmap` one computation serves all diffs."""

    def alone(head_: Head, groups: Groups) -> Any:
        out = _many(options, gradient, head_, jax.tree.map(lambda x: x[None], groups))
        return jax.tree.map(lambda x: x[0], out)

    # On a mesh the diffs of a `vmap` lie on different devices, which compute their own.
    if parallel.spmd_axes() is not None:
        return alone
    compute = jax.custom_batching.custom_vmap(alone)

    @compute.def_vmap
    def together(size: int, batched: Any, head_: Head, groups: Groups) -> Any:
        if head_.base is None and not any(jax.tree.leaves(batched[0])):

            def stack(x: jax.Array, has: bool) -> jax.Array:
                return x if has else jnp.broadcast_to(x, (size, *x.shape))

            out = _many(options, gradient, head_, jax.tree.map(stack, groups, batched[1]))
        else:  # each diff has its own head, or at least its own gradient of the head
            axes = jax.tree.map(lambda has: 0 if has else None, tuple(batched))
            out = jax.vmap(alone, axes, axis_size=size)(head_, groups)
        return out, jax.tree.map(lambda _: True, out)

    return compute


def _many(options: Options, gradient: bool, head_: Head, groups: Groups) -> Any:
    """Losses [n], and gradients of hidden states [n, S, M, D] and weight [n, …], for groups with leaves [n, S, M, …].

    The head may be a changed one only if n, the number of diffs, is 1.
    """
    shapes = [None if group is None else group.weight.shape for group in groups]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)
    limits = options.packed or (None, None)
    packed, restores = zip(*map(_pack, flat, limits), strict=True)
    count = next(shape[0] for shape in shapes if shape is not None)
    losses = [jnp.zeros((count,), jnp.float32)] * 2
    of_hidden: list[Any] = [None, None]
    of_weight: list[Any] = [None, None]
    for i, found in enumerate(_chunks(options, gradient, head_, packed)):
        shape, restore = shapes[i], restores[i]
        if shape is None or found is None:
            continue
        losses[i] = restore(found.terms).reshape(count, -1).sum(axis=1)
        if found.hidden is not None:
            of_hidden[i] = restore(found.hidden).reshape(*shape, -1)
        if found.weight is not None:
            of_weight[i] = found.weight[None].astype(head_.weight.dtype)
    return tuple(losses), (tuple(of_hidden), tuple(of_weight))


def _pack(group: Scored | None, count: int | None) -> tuple[Scored | None, Any]:
    """The first `count` entries of a group, used ones first, [1, count, …]; and how to put results back in place."""
    if group is None or count is None or count >= group.weight.size:
        return group, lambda y: y
    count = max(count, 1)  # if none is used, take one that is not
    shape = group.weight.shape
    used = group.weight.reshape(-1) != 0
    order = jnp.argsort(~used, stable=True)[:count]
    place = jnp.minimum(jnp.cumsum(used) - used, count - 1)

    def restore(y: jax.Array) -> jax.Array:
        y = y.reshape(count, *y.shape[2:])
        kept = used.reshape(-1, *(1,) * (y.ndim - 1))
        return jnp.where(kept, y[place], 0).reshape(*shape, *y.shape[1:])

    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[order][None], group), restore


def _chunks(options: Options, gradient: bool, head_: Head, groups: Groups) -> list[Found | None]:
    """The losses of both groups, leaves [S, M, …], chunk by chunk."""
    ce, kl = groups
    rows = functools.partial(_rows, options.config, gradient, head_)

    def on(ce: Scored | None, kl: Scored | None) -> list[Found | None]:
        found = rows(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (ce, kl)))

        def shaped(group: Scored | None, out: Found | None) -> Found | None:
            if group is None or out is None:
                return None
            terms, hidden = jax.tree.map(
                lambda y: y.reshape(*group.weight.shape, *y.shape[1:]), (out.terms, out.hidden)
            )
            return Found(terms, hidden, out.weight)

        return [shaped(*pair) for pair in zip((ce, kl), found, strict=True)]

    def size(group: Scored | None) -> int:
        return 0 if group is None else group.weight.size

    if size(ce) + 2 * size(kl) <= options.chunk:
        return on(ce, kl)
    return [
        _map_chunks(lambda part: on(part, None)[0], ce, options.chunk),
        _map_chunks(lambda part: on(None, part)[1], kl, options.chunk // 2),
    ]


def _map_chunks(fn: Any, group: Scored | None, chunk: int) -> Found | None:
    """fn over entries [S, M, …], about `chunk` of them at a time; the last chunk is padded with weight 0.

    A chunk holds entries of every sample, so that a mesh that splits the samples splits each chunk.
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

    def step(total: Any, part: Scored) -> tuple[Any, Any]:
        found = fn(part)
        return jax.tree.map(jnp.add, total, found.weight), (found.terms, found.hidden)

    parts = jax.tree.map(split, group)
    shape = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts)).weight
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    total, made = jax.lax.scan(step, start, parts)
    terms, hidden = jax.tree.map(join, made)
    return Found(terms, hidden, total)


def _rows(
    config: DecoderConfig, gradient: bool, head_: Head, ce: Scored | None, kl: Scored | None
) -> list[Found | None]:
    """The losses of both groups, leaves [E, …], by one product with the head."""
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
    terms: list[Any] = [None, None]
    if ce is not None:
        target = ce.against[:, None]
        chosen = jnp.take_along_axis(logits[:split], target, axis=-1)
        terms[0] = ce.weight * (norm[:split] - chosen)[:, 0]
    if kl is not None:
        student, of_base = logits[split:rows], logits[rows:] - norm[rows:]
        # Σ p (log p - log q) with log q = logits - norm: fewer passes over [E, V] than with log q itself.
        divergence = jnp.sum(jnp.exp(of_base) * (of_base - student), axis=-1)
        terms[1] = kl.weight * (divergence + norm[split:rows, 0])
    if not gradient:
        return [None if one is None else Found(one, None, None) for one in terms]

    def slopes(first: Any, count: int) -> jax.Array:
        """weight · (probability - wanted probability) for `count` entries of the vocabulary, from `first` on."""
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
    parts = [np.s_[:split], np.s_[split:]]
    of_weight: list[Any] = [None, None]
    if head_.base is not None:
        of_logits = slopes(0, config.vocab_size)
        students = jnp.concatenate(hidden)
        of_weight = [head.to_weight(config, of_logits[part], students[part]) for part in parts]
    return [
        None if one is None else Found(one, slope[part], weight)
        for one, part, weight in zip(terms, parts, of_weight, strict=True)
    ]
