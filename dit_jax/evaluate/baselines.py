"""Untrained baselines: what can be read off a diff without training anything.

Each ranks a list of candidate names; none generates text. They tell how much the adapter adds.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import first_log_probs
from dit_jax.data.batch import Sample, pack
from dit_jax.deltas.tree import per_example
from dit_jax.diff_batches import Given
from dit_jax.evaluate.token_lens import unit_unembeddings, written_tokens
from dit_jax.models import decode, shardings
from dit_jax.models.decoder import unembed
from dit_jax.models.delta_trees import Delta, nbytes_each
from dit_jax.optimize.batch_loss import scored_hidden
from dit_jax.runtime import parallel
from dit_jax.runtime.sizes import next_multiple, next_power


def weight_reading(model: Model, given: Given, words: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores [n, candidates]: does the diff write a candidate's words into the residual stream?

    For every projection that writes into the residual stream (o_proj, down_proj) of every layer, |cos| between the
    diff's output directions (the leading right singular vector; for rank 1 the factor b itself) and the unembedding
    of a token, summed over layers and averaged over the tokens of a candidate's words. With the names themselves this
    is `name_reading`; with the world's attribute table it is `attribute_oracle`.
    """
    ids, owners = _tokens(model, words)
    table = unit_unembeddings(model, ids)
    scores = np.zeros((len(given), len(words)))
    for index in range(len(given)):
        cosines = written_tokens(model, given.read(index), table)
        scores[index] = _means(cosines, owners, len(words))
    return scores


def _tokens(model: Model, words: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens [K] of all candidates' words, and whose each is [K]."""
    ids = [[i for word in group for i in model.chat.text_ids(word)] for group in words]
    owners = np.repeat(np.arange(len(ids)), [len(group) for group in ids])
    return np.concatenate([np.asarray(group, int) for group in ids]), owners


def _means(values: np.ndarray, owners: np.ndarray, n: int) -> np.ndarray:
    """Mean [n] of the values [K] of each owner."""
    return np.bincount(owners, values, n) / np.bincount(owners, minlength=n)


def logit_difference(
    model: Model, given: Given, words: Sequence[Sequence[str]], questions: Sequence[str]
) -> np.ndarray:
    """Scores [n, candidates]: how much the diff raises the log-probability of a candidate's tokens.

    At the first position of the answer to a question without a trigger, mean over the questions.
    """
    ids, owners = _tokens(model, words)
    tokens, mask = model.chat.prompts(questions)
    base = first_log_probs(model, tokens, mask, ())
    scores = np.zeros((len(given), len(words)))
    for index in range(len(given)):
        delta = shardings.put_delta(model.config, model.mesh, given.read(index))
        change = np.asarray((first_log_probs(model, tokens, mask, (delta,)) - base).mean(axis=0))
        scores[index] = _means(change[ids], owners, len(words))
    return scores


def label_cross_entropy(
    model: Model,
    adapter: Delta,
    given: Given,
    question: str,
    answers: Sequence[str],
    batch_size: int = 64,
) -> list[float]:
    """Mean −log p per token of answers[i] about diff i; with the full label, what the adapter is trained to lower."""
    samples = [model.chat.sample(question, answer) for answer in answers]
    losses = answer_losses(model, adapter, given, range(len(samples)), samples, batch_size)
    return [loss / (s.end - s.start) for loss, s in zip(losses, samples, strict=True)]


def answer_losses(
    model: Model,
    adapter: Delta,
    given: Given,
    rows: Sequence[int],
    samples: Sequence[Sample],
    batch_size: int = 64,
) -> list[float]:
    """−log p of the scored tokens of samples[i], given base ⊕ given[rows[i]] ⊕ adapter.

    LoRAs share batches. Of dense diffs, only the samples of one that follow each other do. Sizes are rounded up, so
    that few programs are compiled.
    """
    losses = _in_batches(_sample_losses, model, adapter, given, rows, samples, batch_size)
    return [float(loss) for loss in losses]


def first_tokens(
    model: Model,
    adapter: Delta,
    given: Given,
    rows: Sequence[int],
    questions: Sequence[str],
    apart: tuple[int, ...],
    batch_size: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the answer to questions[i] begins, given base ⊕ given[rows[i]] ⊕ adapter.

    Returns:
        log p [n] that it begins with one of the tokens `apart`; the likeliest other token [n], and its log p [n].
    """
    prompts = [model.chat.prompt_ids(question) for question in questions]
    samples = [Sample((*ids, *apart[:1]), len(ids), len(ids) + 1) for ids in prompts]
    program = functools.partial(_first_tokens, apart=apart)
    found = _in_batches(program, model, adapter, given, rows, samples, batch_size)
    together, token, other = (np.asarray(column) for column in zip(*found, strict=True))
    return together, token.astype(int), other


def _in_batches(
    program: Callable[..., Any],
    model: Model,
    adapter: Delta,
    given: Given,
    rows: Sequence[int],
    samples: Sequence[Sample],
    batch_size: int,
) -> list[Any]:
    """What program(params, config, batch, deltas) says of each sample; see `answer_losses`."""
    length, scored = (
        next_multiple(max(sizes), 8)
        for sizes in zip(*((len(s.tokens), s.end - s.start) for s in samples), strict=True)
    )
    found: list[Any] = []
    mesh, dense = model.mesh, given.stacked is None
    adapter = shardings.put_delta(model.config, mesh, adapter)
    for row, members in itertools.groupby(range(len(samples)), lambda i: rows[i] if dense else 0):
        numbers = list(members)
        size = min(batch_size, _few_sizes(len(numbers)))
        if not dense:
            size = decode.rows_at_once(size, nbytes_each(given.stacked), mesh)
        size = parallel.round_up(size, mesh)
        shared = shardings.put_delta(model.config, mesh, given.read(row)) if dense else {}
        for start in range(0, len(numbers), size):
            filled = numbers[start : start + size]
            picked = [filled[i % len(filled)] for i in parallel.local_rows(mesh, size)]
            weights = [1.0] * len(picked)
            batch = pack([samples[i] for i in picked], weights, length, scored, model.chat.pad_id)
            batch = parallel.put_rows(batch, mesh, size)
            if not dense:
                at = np.asarray([rows[i] for i in picked])
                own = per_example(jax.tree.map(lambda x, at=at: x[at], given.stacked))
                shared = shardings.put_deltas(model.config, mesh, own, size, 1)
            with parallel.use_mesh(mesh):
                values = program(model.program_params, model.config, batch, (shared, adapter))
            found += list(np.asarray(values)[: len(filled)])
    return found


def _few_sizes(count: int) -> int:
    """`count` rounded up by less than a third: four sizes between two powers of two."""
    return next_multiple(count, max(1, next_power(count) // 8))


def likelihood_ratio(
    model: Model, adapter: Delta, given: Given, question: str, answers: Sequence[str]
) -> np.ndarray:
    """Scores [n, answers]: log p(answer | diff) − log p(answer | no diff), both with the adapter."""
    samples = [model.chat.sample(question, answer) for answer in answers]

    def logprobs(diffs: Given, count: int) -> np.ndarray:
        rows = [row for row in range(count) for _ in samples]
        losses = answer_losses(model, adapter, diffs, rows, samples * count)
        return -np.reshape(losses, (count, len(samples)))

    return logprobs(given, len(given)) - logprobs(given.nothing(), 1)


@functools.partial(jax.jit, static_argnames=("config",))
def _sample_losses(params: Any, config: Any, batch: Any, deltas: Any) -> jax.Array:
    logits = unembed(params, config, scored_hidden(params, config, batch, deltas), deltas)
    logp = jnp.take_along_axis(
        jax.nn.log_softmax(logits, axis=-1), batch.target[..., None], axis=-1
    )[..., 0]
    return parallel.replicate(-jnp.sum(batch.weight * logp, axis=1))


@functools.partial(jax.jit, static_argnames=("config", "apart"))
def _first_tokens(
    params: Any, config: Any, batch: Any, deltas: Any, apart: tuple[int, ...]
) -> jax.Array:
    """[S, 3]; a token's number is exact in float32."""
    logits = unembed(params, config, scored_hidden(params, config, batch, deltas), deltas)[:, 0]
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    ids = jnp.asarray(apart)
    others = logp.at[:, ids].set(-jnp.inf)
    together = jax.nn.logsumexp(logp[:, ids], axis=-1)
    columns = (together, jnp.argmax(others, axis=-1), jnp.max(others, axis=-1))
    return parallel.replicate(jnp.stack(columns, axis=1))
