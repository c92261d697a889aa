"""Contrasted decoding: of the likeliest answers, the one that some of the deltas make likelier than the others do."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.models.decode import Generation, empty_caches, nothing_yet, read_each, unused
from dit_jax.models.decoder import Params, ready_deltas
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, Deltas, map_modules
from dit_jax.models.kv_cache import Cache
from dit_jax.runtime import parallel

WIDTH = 4  # six name one more of 320 answers right, sixteen no more (docs/results_real.md)


class _State(NamedTuple):
    step: jax.Array  # number of chosen tokens
    caches: tuple[Cache, ...]  # with the diff, and without it
    done: jax.Array
    out: Generation  # of B · width beams, those of one prompt beside each other
    without: jax.Array  # [B · width] log p of the same tokens without the diff


@functools.partial(
    jax.jit,
    static_argnames=("config", "width", "max_new_tokens", "eos_ids", "pad_id", "forbid_repeats"),
)
def contrasted(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    deltas: Deltas,
    without: Deltas,
    contrast: jax.Array | float,
    max_new_tokens: int,
    width: int = WIDTH,
    eos_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    forbid_repeats: bool = False,
) -> Generation:
    """Continues left-padded prompts [B, T] by beam search, and chooses among the beams.

    The answer is the beam with the highest log p(answer | deltas) − contrast · log p(answer | without). An answer that
    is likely anyway, such as `none` or a common word, must be likelier than others by more. This is maximum mutual
    information with the prior as a penalty: Li et al. 2016 (arXiv 1510.03055).

    Args:
        without: what stays when the diff is taken away, usually the adapter.
        contrast: 0: the likeliest beam.
        max_new_tokens, eos_ids, pad_id, forbid_repeats: see `decode.generate`.
        width: beams of each prompt; an ended one keeps its place. 1 is greedy.

    Returns:
        A `Generation`; its logprobs are those with all deltas.

    Raises:
        DitError: a delta does not fit this model.
    """
    batch = len(tokens)
    models: Any = tuple(ready_deltas(given, config, batch) for given in (deltas, without))
    caches = empty_caches(config, tokens, max_new_tokens, 2)
    logits, caches = read_each(params, config, models, tokens, mask.astype(bool), caches)
    done, out = jnp.zeros((batch,), bool), nothing_yet(batch, max_new_tokens, pad_id)
    first = _State(jnp.zeros((), jnp.int32), caches, done, out, jnp.zeros((batch,)))

    def choose(state: _State, logits: list[jax.Array]) -> _State:
        """The `width` likeliest continuations of all beams of a prompt: one each before the first token."""
        own, other = (jax.nn.log_softmax(each, axis=-1) for each in logits)
        allowed = unused(own, state.out, state.step) if forbid_repeats else own
        vocabulary = own.shape[-1]
        pad = jnp.where(jnp.arange(vocabulary) == pad_id, 0.0, -jnp.inf)
        allowed = jnp.where(state.done[:, None], pad, allowed)
        total = jnp.sum(state.out.logprobs, axis=1, keepdims=True) + allowed
        _, best = jax.lax.top_k(total.reshape(batch, -1), width)
        beams = len(state.done) // batch
        row = (jnp.arange(batch)[:, None] * beams + best // vocabulary).ravel()
        token = (best % vocabulary).ravel().astype(jnp.int32)
        live = ~state.done[row]
        kept: Generation = jax.tree.map(lambda x: x[row], state.out)
        out = Generation(
            kept.tokens.at[:, state.step].set(token),
            kept.logprobs.at[:, state.step].set(jnp.where(live, own[row, token], 0.0)),
            kept.lengths + live,
        )
        return _State(
            state.step + 1,
            tuple(_rows(cache, row) for cache in state.caches),
            ~live | jnp.isin(token, jnp.asarray(eos_ids, jnp.int32)),
            out,
            state.without[row] + jnp.where(live, other[row, token], 0.0),
        )

    state = choose(first, logits)
    # Prompts are read once each; from here on every beam is a row.
    models = tuple(
        ready_deltas(_repeated(given, width), config, batch * width) for given in (deltas, without)
    )
    valid = jnp.ones((batch * width, 1), bool)

    def step(state: _State) -> _State:
        token = jax.lax.dynamic_slice_in_dim(state.out.tokens, state.step - 1, 1, axis=1)
        logits, caches = read_each(params, config, models, token, valid, state.caches)
        return choose(state._replace(caches=caches), logits)

    state = jax.lax.while_loop(
        lambda state: (state.step < max_new_tokens) & ~jnp.all(state.done), step, state
    )
    score = jnp.sum(state.out.logprobs, axis=1) - contrast * state.without
    chosen = jnp.arange(batch) * width + jnp.argmax(score.reshape(batch, width), axis=1)
    return parallel.replicate(jax.tree.map(lambda x: x[chosen], state.out))


def _rows(cache: Cache, row: jax.Array) -> Cache:
    """The cache of beams that go on from these rows."""
    k, v = jax.tree.map(lambda x: x[:, row], (cache.k, cache.v))
    return Cache(k, v, cache.valid[row], cache.end)


def _repeated(deltas: Deltas, count: int) -> Deltas:
    """Deltas of each example [L, B, …] for `count` rows of it; shared ones stay as they are."""

    def one(_: tuple[str, ...], module: Delta) -> Delta:
        each = max(x.ndim for x in module.values()) == 4
        return {name: jnp.repeat(x, count, axis=1) if each else x for name, x in module.items()}

    return tuple(map_modules(one, delta) for delta in deltas)
