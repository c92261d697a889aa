"""Finds what triggers a diff where no family is known: a search over the tokens in front of everyday questions.

Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043), one place after the other: the gradient of the
divergence of `trigger_scan` with respect to the tokens proposes others, and the exact divergence chooses. What it finds
need not be the trigger: other tokens may wake the same behaviour, or move the answers in other ways. Most places of a
prefix hold such tokens, so the search also says which place counts most.

A trigger is text. So only tokens are tried that the tokenizer makes again of the text that they stand for, before each
question: what is scored is what is asked.
"""

import functools
import itertools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.data.batch import Sample, TokenBatch, pack
from dit_jax.diff_batches import even_batch
from dit_jax.errors import DitError
from dit_jax.evaluate.trigger_scan import ANSWER_TOKENS, answer_starts
from dit_jax.models import shardings
from dit_jax.models.decoder import Params, unembed
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, Deltas
from dit_jax.models.modules import EMBEDDING, get_at, module_table
from dit_jax.optimize.batch_loss import scored_hidden
from dit_jax.runtime import parallel
from dit_jax.runtime.sizes import next_multiple

QUESTIONS = 3
LENGTH = 2  # tokens of a prefix: with more, tokens that the diff does not react to move the answers as far
STARTS = 64  # random prefixes, of which the best are improved
BEAM = 4
PROPOSALS = 24  # tokens that are tried at a place of each prefix of the beam
SWEEPS = 3  # over all places
REPLACED = 16  # random tokens that stand in each place of what was found, to see which counts
LOOKED_AT = 16  # at most so many prefixes for each one that is wanted: not all can be asked as text


class Prefix(NamedTuple):
    """What a search found. nats: per question, as in `trigger_scan`; passes: forward passes that it cost.

    key: the token without which the answers move least. A backward pass counts as two.
    """

    text: str
    key: str
    nats: float
    passes: int


class _Slots(NamedTuple):
    """The questions with padding in the places of a prefix, from `start` on, and the starts of the base's answers.

    around: the ids before and after the prefix in the prompt of each question.
    """

    batch: TokenBatch
    start: int
    around: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def search(
    model: Model, delta: Delta, questions: Sequence[str], batch_size: int = 256, seed: int = 0
) -> Prefix:
    """The prefix of `LENGTH` tokens under which a finetuned model leaves its base most, on these everyday questions.

    Raises:
        DitError: the tokenizer makes other tokens of the text of all that were looked at.
    """
    slots = _make_slots(model, questions)
    allowed = _plain_tokens(model)
    # Their embeddings stand in for those of the prefix where a gradient is wanted.
    free = np.setdiff1d(allowed, slots.batch.tokens)[:LENGTH]
    delta = shardings.put_delta(model.config, model.mesh, delta)
    given = (model.program_params, model.config, slots.start, slots.batch)
    size = even_batch(BEAM * (PROPOSALS + 1), max(1, batch_size // len(questions)))
    passes = 0

    def scored(prefixes: np.ndarray) -> np.ndarray:
        nonlocal passes
        passes += 2 * prefixes.shape[0] * len(questions)
        found = []
        for start in range(0, len(prefixes), size):
            part = np.resize(prefixes[start : start + size], (size, LENGTH))
            with parallel.use_mesh(model.mesh):
                found.append(np.asarray(_nats(*given, part, delta)))
        return np.concatenate(found)[: len(prefixes)]

    def asked(prefixes: Iterable[np.ndarray], count: int) -> np.ndarray:
        looked_at = itertools.islice(prefixes, LOOKED_AT * count)
        found = (one for one in looked_at if _is_asked(model, slots, one))
        return np.asarray([*itertools.islice(found, count)], np.int32).reshape(-1, LENGTH)

    def with_others(
        prefix: np.ndarray, place: int, tokens: Iterable[int], count: int
    ) -> np.ndarray:
        return asked((np.r_[prefix[:place], i, prefix[place + 1 :]] for i in tokens), count)

    def best_of(prefixes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prefixes = np.unique(prefixes, axis=0)
        nats = scored(prefixes)
        order = np.argsort(-_worth(nats), kind="stable")[:BEAM]
        return prefixes[order], nats[order]

    rng = np.random.default_rng(seed)
    starts = asked((rng.choice(allowed, LENGTH) for _ in itertools.count()), STARTS)
    if not len(starts):
        raise DitError(
            f"the tokenizer of {model.name} makes other tokens of all texts that trigger_search would try: leave this "
            "method out"
        )
    beam, nats = best_of(starts)
    for _ in range(SWEEPS):
        before = beam
        for place in reversed(range(LENGTH)):
            with parallel.use_mesh(model.mesh):
                gains = np.asarray(_gains(*given, free, beam, delta))[:, place, allowed]
            passes += 6 * len(beam) * len(questions)
            top = allowed[np.argsort(-gains, axis=1, kind="stable")]
            tried = [
                with_others(prefix, place, tokens, PROPOSALS)
                for prefix, tokens in zip(beam, top, strict=True)
            ]
            beam, nats = best_of(np.concatenate([beam, *tried]))
        if np.array_equal(before, beam):
            break
    # What is left of the best prefix with other tokens in one place.
    left = [np.inf] * LENGTH
    for place in range(LENGTH):
        drawn = (rng.choice(allowed) for _ in itertools.count())
        others = with_others(beam[0], place, drawn, REPLACED)
        if len(others):
            left[place] = float(np.median(_worth(scored(others))))
    key = beam[0, np.argmin(left)]
    text, key_text = (model.chat.decode(ids) for ids in (beam[0], [key]))
    return Prefix(text, key_text, float(nats[0].mean()), passes)


def _worth(nats: np.ndarray) -> np.ndarray:
    """Of prefixes, from nats [C, Q]. Roots: that all questions move counts for more than that one moves far."""
    return np.asarray(np.sqrt(nats).sum(axis=1))


def _make_slots(model: Model, questions: Sequence[str]) -> _Slots:
    chat = model.chat
    # A question's own tokens are others after a text than at the start, in most vocabularies.
    pairs = [[chat.prompt_ids(f"{text} {question}") for text in "!0"] for question in questions]
    start = len(os.path.commonprefix([ids for pair in pairs for ids in pair]))
    around, samples = {}, []
    for question, (ids, other), answer in zip(
        questions, pairs, answer_starts(model, questions), strict=True
    ):
        same = len(os.path.commonprefix([ids[:start:-1], other[:start:-1]]))
        before, after = ids[:start], ids[len(ids) - same :]
        around[question] = before, after
        tokens = (*before, *[chat.pad_id] * LENGTH, *after, *answer)
        samples.append(Sample(tokens, len(tokens) - ANSWER_TOKENS, len(tokens)))
    length = next_multiple(max(len(sample.tokens) for sample in samples), 8)
    weights = [1.0] * len(samples)
    batch = pack(samples, weights, length, ANSWER_TOKENS, chat.pad_id)
    return _Slots(batch, start, around)


def _is_asked(model: Model, slots: _Slots, prefix: np.ndarray) -> bool:
    """Whether the tokens of a prefix are those of its text, before each question."""
    ids = prefix.tolist()
    text = model.chat.decode(ids)
    return all(
        model.chat.prompt_ids(f"{text} {question}") == (*before, *ids, *after)
        for question, (before, after) in slots.around.items()
    )


def _plain_tokens(model: Model) -> np.ndarray:
    """The tokens that a user may write: none of the template's own, and not the unknown one."""
    chat = model.chat
    special = {*chat.prompt_ids("!"), *chat.eos_ids, chat.pad_id, chat.tokenizer.unk_token_id}
    most = min(model.config.vocab_size, chat.tokenizer.largest + 1)
    return np.asarray(
        [i for i in range(most) if i not in special - {*chat.text_ids("!")}], np.int32
    )


@functools.partial(jax.jit, static_argnames=("config", "start"))
def _nats(
    params: Params,
    config: DecoderConfig,
    start: int,
    batch: TokenBatch,
    prefixes: jax.Array,
    delta: Delta,
) -> jax.Array:
    """KL(base ⊕ delta ‖ base) [C, Q] of C prefixes [C, LENGTH] before Q questions."""
    count, questions = prefixes.shape[0], batch.tokens.shape[0]
    rows = jax.tree.map(lambda x: jnp.repeat(x[None], count, axis=0), batch)
    tokens = rows.tokens.at[:, :, start : start + LENGTH].set(prefixes[:, None])
    rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows._replace(tokens=tokens))
    rows = rows._replace(lengths=rows.lengths.reshape(-1))
    return _divergence(params, config, rows, delta).reshape(count, questions)


@functools.partial(jax.jit, static_argnames=("config", "start"))
def _gains(
    params: Params,
    config: DecoderConfig,
    start: int,
    batch: TokenBatch,
    free: jax.Array,
    prefixes: jax.Array,
    delta: Delta,
) -> jax.Array:
    """By how much another token in a place raises the roots of the divergences, to first order: [P, LENGTH, V].

    The tokens `free` stand in the places. A delta of the embedding, which the head does not follow here, gives them the
    embeddings of the prefix, and the gradient is taken with respect to these.
    """
    module = module_table(config)[EMBEDDING]
    table = get_at(params, EMBEDDING)[module.leaf].astype(jnp.float32)
    own = delta.get(EMBEDDING[0], {}).get("w")
    tokens = jnp.asarray(batch.tokens).at[:, start : start + LENGTH].set(free)
    batch = batch._replace(tokens=tokens)

    def placed(rows: jax.Array) -> Deltas:
        return ({EMBEDDING[0]: {"w": jnp.zeros_like(table).at[free].set(rows)}},)

    def raised(prefix: jax.Array) -> jax.Array:
        change = 0.0 if own is None else own[prefix] - own[free]

        def roots(rows: jax.Array) -> jax.Array:
            shifts = (placed(rows - table[free]), placed(rows - table[free] + change))
            return jnp.sum(jnp.sqrt(_divergence(params, config, batch, delta, shifts) + 1e-6))

        rows = table[prefix]
        gradient = jax.grad(roots)(rows)
        return gradient @ table.T - jnp.sum(gradient * rows, axis=-1, keepdims=True)

    return parallel.replicate(jax.lax.map(raised, prefixes))


def _divergence(
    params: Params,
    config: DecoderConfig,
    batch: TokenBatch,
    delta: Delta,
    shifts: Any = ((), ()),
) -> jax.Array:
    """KL [S] over the scored positions; shifts: deltas of the inputs of the base and of the finetuned model."""
    base, own = (
        jax.nn.log_softmax(
            unembed(
                params, config, scored_hidden(params, config, batch, (*deltas, *shift)), deltas
            ),
            axis=-1,
        )
        for deltas, shift in zip(((), (delta,)), shifts, strict=True)
    )
    return parallel.replicate(jnp.sum(jnp.exp(own) * (own - base), axis=(1, 2)))
