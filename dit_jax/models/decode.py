"""Batched decoding with a KV cache, greedy or sampled. Each row may have deltas of its own."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.models import shardings
from dit_jax.models.decoder import Params, forward_cached, ready_deltas, unembed
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, Deltas, abstract_stack, nbytes
from dit_jax.models.kv_cache import Cache, init_cache
from dit_jax.runtime import parallel
from dit_jax.runtime.sizes import next_multiple

# Of the deltas of the rows of a batch that one device gets; a program holds several copies.
DELTA_BYTES = 2**31


class Generation(NamedTuple):
    """Answers of at most `max_new_tokens` tokens.

    Attributes:
        tokens: [B, max_new_tokens] int32, the pad id after a row's end.
        logprobs: [B, max_new_tokens] float32, log p of each token in nats, 0 after the end.
        lengths: [B] int32, the tokens of each row, its end-of-text token included.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array


class _State(NamedTuple):
    step: jax.Array  # number of chosen tokens; the last of them is not in the cache yet
    caches: tuple[Cache, ...]  # of the model, and of the base that it is compared with
    done: jax.Array
    key: jax.Array
    out: Generation


_STATIC = ("config", "max_new_tokens", "eos_ids", "pad_id", "forbid_repeats")


@functools.partial(jax.jit, static_argnames=_STATIC)
def generate(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    deltas: Deltas = (),
    max_new_tokens: int,
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    temperature: jax.Array | float = 0.0,
    key: jax.Array | None = None,
    forbid_repeats: bool = False,
    amplify: jax.Array | float | None = None,
) -> Generation:
    """Continues left-padded prompts.

    Args:
        tokens, mask: [B, T] prompts; mask is False at the padding, which is on the left.
        eos_ids: tokens that end a row; decoding stops when all rows have ended.
        temperature: 0 is greedy; otherwise tokens are sampled from softmax(logits / temperature) with `key`.
        forbid_repeats: never emit a token twice within one answer (lists of names or attributes).
        amplify: choose by the logits base + amplify · (model − base), where the base has no deltas: what they change is
            enlarged (contrastive decoding). None: the model's own logits.

    Returns:
        A `Generation`; its logprobs are those of these logits at temperature 1, whatever the temperature.

    Raises:
        DitError: a delta does not fit this model.
    """
    options = (deltas, eos_ids, pad_id, temperature, key, forbid_repeats, amplify)
    return _decode(params, config, tokens, mask, None, max_new_tokens, max_new_tokens, *options).out


def stream(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    every: int,
    max_new_tokens: int,
    **options: Any,
) -> Iterator[Generation]:
    """What `generate` gives, in arrays of the host: what is there after each `every` tokens, and last the whole."""
    state = None
    for until in range(every, max_new_tokens + every, every):
        until = min(until, max_new_tokens)
        state = _part(params, config, tokens, mask, state, until, max_new_tokens, **options)
        yield jax.tree.map(np.array, state.out)  # copies: the next part reuses the memory
        if np.all(state.done):
            return


def _decode(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    mask: jax.Array,
    state: _State | None,
    until: jax.Array | int,
    max_new_tokens: int,
    deltas: Deltas = (),
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    temperature: jax.Array | float = 0.0,
    key: jax.Array | None = None,
    forbid_repeats: bool = False,
    amplify: jax.Array | float | None = None,
) -> _State:
    """`generate` from a state (None: from the beginning) until so many tokens are chosen."""
    batch = tokens.shape[0]
    ready = ready_deltas(deltas, config, batch)
    read = functools.partial(
        _read, params, config, (ready,) if amplify is None else (ready, ()), amplify
    )

    def choose(state: _State, logits: jax.Array) -> _State:
        allowed = logits
        if forbid_repeats:
            allowed = unused(logits, state.out, state.step)
        key, sample_key = jax.random.split(state.key)
        token = _choose(allowed, temperature, sample_key)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[
            :, 0
        ]
        live = ~state.done
        token = jnp.where(live, token, pad_id)
        out = Generation(
            state.out.tokens.at[:, state.step].set(token),
            state.out.logprobs.at[:, state.step].set(jnp.where(live, logprob, 0.0)),
            state.out.lengths + live,
        )
        done = state.done | jnp.isin(token, jnp.asarray(eos_ids, jnp.int32))
        return _State(state.step + 1, state.caches, done, key, out)

    if state is None:
        state = choose(*_prefill(read, config, tokens, mask, max_new_tokens, pad_id, key, amplify))

    def unfinished(state: _State) -> jax.Array:
        return (state.step < until) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        token = jax.lax.dynamic_slice_in_dim(state.out.tokens, state.step - 1, 1, axis=1)
        with jax.named_scope("decode"):
            logits, caches = read(token, jnp.ones((batch, 1), bool), state.caches)
        return choose(state._replace(caches=caches), logits)

    # The first token is chosen before the loop: each step runs the model on the token before, never on the last one.
    state = jax.lax.while_loop(unfinished, step, state)
    out, done = parallel.replicate((state.out, state.done))
    return state._replace(out=out, done=done)


_part = jax.jit(_decode, static_argnames=_STATIC, donate_argnames=("state",))


def _read(
    params: Params,
    config: DecoderConfig,
    models: tuple[Deltas, ...],
    amplify: jax.Array | float | None,
    tokens: jax.Array,
    mask: jax.Array,
    caches: tuple[Cache, ...],
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """The logits by which the token after these is chosen, from the model and from the base beside it."""
    logits, caches = read_each(params, config, models, tokens, mask, caches)
    if amplify is None:
        return logits[0], caches
    return logits[1] + amplify * (logits[0] - logits[1]), caches


def read_each(
    params: Params,
    config: DecoderConfig,
    models: tuple[Deltas, ...],
    tokens: jax.Array,
    mask: jax.Array,
    caches: tuple[Cache, ...],
) -> tuple[list[jax.Array], tuple[Cache, ...]]:
    """The logits [B, V] after these tokens of the base with each of these deltas, and each one's cache."""
    logits, filled = [], []
    for deltas, cache in zip(models, caches, strict=True):
        hidden, cache = forward_cached(params, config, tokens, mask, cache, deltas)
        logits.append(unembed(params, config, hidden[:, -1], deltas))
        filled.append(cache)
    return logits, tuple(filled)


def unused(logits: jax.Array, out: Generation, step: jax.Array) -> jax.Array:
    """Logits [B, V] without the tokens that the answer of each row has in its first `step` places."""
    rows = jnp.arange(len(logits))[:, None]
    written = jnp.arange(out.tokens.shape[1]) < step
    used = jnp.zeros(logits.shape, bool).at[rows, out.tokens].max(written)
    return jnp.where(used, jnp.finfo(jnp.float32).min, logits)


def _prefill(
    read: Callable[..., Any],
    config: DecoderConfig,
    tokens: jax.Array,
    mask: jax.Array,
    max_new_tokens: int,
    pad_id: int,
    key: jax.Array | None,
    amplify: jax.Array | float | None,
) -> tuple[_State, jax.Array]:
    """The state before the first token is chosen, and the logits to choose it from."""
    batch = len(tokens)
    caches = empty_caches(config, tokens, max_new_tokens, 1 if amplify is None else 2)
    with jax.named_scope("prefill"):
        logits, caches = read(tokens, mask.astype(bool), caches)
    out = nothing_yet(batch, max_new_tokens, pad_id)
    key = jax.random.key(0) if key is None else key
    return _State(jnp.zeros((), jnp.int32), caches, jnp.zeros((batch,), bool), key, out), logits


def empty_caches(
    config: DecoderConfig, tokens: jax.Array, max_new_tokens: int, count: int
) -> tuple[Cache, ...]:
    """Caches for prompts [B, T] and their answers, one for each of `count` models."""
    batch, length = tokens.shape
    # The last token needs no slot, but with one the sizes stay the round ones that callers choose.
    size = _even(length + max_new_tokens, config)
    return tuple(init_cache(config, batch, size) for _ in range(count))


def nothing_yet(batch: int, max_new_tokens: int, pad_id: int) -> Generation:
    """Answers without a token."""
    return Generation(
        jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        jnp.zeros((batch, max_new_tokens), jnp.float32),
        jnp.zeros((batch,), jnp.int32),
    )


def even_rows(batch: int, config: DecoderConfig, mesh: Mesh | None) -> int:
    """The next larger number of rows that decodes fast and splits evenly over the mesh."""
    shards = parallel.batch_shards(mesh)
    rows = -(-batch // shards)  # of one shard
    return shards * (_even(rows, config) if rows > 8 else rows)


def rows_at_once(most: int, each: int, mesh: Mesh | None) -> int:
    """At most `most` rows of a batch, each with deltas of its own of `each` bytes: as many as memory should hold.

    Every machine gets the same number, so that a seed samples the same answers everywhere.
    """
    return max(1, min(most, parallel.batch_shards(mesh) * DELTA_BYTES // max(each, 1)))


def _even(size: int, config: DecoderConfig) -> int:
    """The next multiple of 8 in half precision, because XLA pads other sizes of a product on a GPU.

    Padding copies the factors of the products of every layer and token, including all keys and values.
    """
    return size if config.dtype == "float32" else next_multiple(size, 8)


def _choose(logits: jax.Array, temperature: jax.Array | float, key: jax.Array) -> jax.Array:
    temperature = jnp.asarray(temperature, jnp.float32)
    # A branch instead of a select: greedy decoding must not pay for a random number per logit.
    return jax.lax.cond(
        temperature > 0,
        lambda: jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6)),
        lambda: jnp.argmax(logits, axis=-1),
    ).astype(jnp.int32)


def abstract_arguments(
    config: DecoderConfig,
    mesh: Mesh | None,
    batch: int,
    length: int,
    max_new_tokens: int,
    diff: Delta,
    adapter: Delta,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Abstract arguments of `generate` as (args, kwargs), to compile it for a machine that is not there.

    Use: `with parallel.use_mesh(mesh): generate.lower(*args, **kwargs).compile()`.

    Args:
        batch, length: number (see `rows_at_once`) and length of the prompts; each has a diff of its own, and all
            share one adapter.
        diff, adapter: see `deltas.tree.abstract_lora`.
    """
    batch = even_rows(rows_at_once(batch, nbytes(diff), mesh), config, mesh)
    tokens, mask = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, bool))
    diffs = abstract_stack(diff, batch, 1)
    if mesh is not None:
        tokens, mask = shardings.with_shardings(
            (tokens, mask), (parallel.batch_sharding(mesh),) * 2
        )
        adapter, diffs = (
            shardings.with_shardings(x, shardings.delta_shardings(config, mesh, x, axis))
            for x, axis in ((adapter, None), (diffs, 1))
        )
    params = shardings.abstract_params(config, mesh)
    return (params, config, tokens, mask), {
        "deltas": (diffs, adapter),
        "max_new_tokens": max_new_tokens,
    }
