"""Untrained baselines: what can be read off a diff without training anything.

Each ranks a list of candidate names; none generates text. They tell how much the adapter adds.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.data.batch import pack
from dit_jax.deltas.factors import modules
from dit_jax.deltas.tree import per_example
from dit_jax.diff_batches import Given
from dit_jax.models import shardings
from dit_jax.models.decoder import forward, unembed
from dit_jax.models.delta_trees import Delta
from dit_jax.models.head import head_path
from dit_jax.models.modules import module_table, projections, weight
from dit_jax.optimize.batch_loss import scored_hidden
from dit_jax.runtime import parallel


def weight_reading(model: Model, given: Given, words: Sequence[Sequence[str]]) -> np.ndarray:
    """Scores [n, candidates]: does the diff write a candidate's words into the residual stream?

    For every projection that writes into the residual stream (o_proj, down_proj) of every layer, |cos| between the
    diff's output directions (the leading right singular vector; for rank 1 the factor b itself) and the unembedding
    of a token, summed over layers and averaged over the tokens of a candidate's words. With the names themselves this
    is `name_reading`; with the world's attribute table it is `attribute_oracle`.
    """
    ids, owners = _tokens(model, words)
    module = module_table(model.config)[head_path(model.config)]
    # In the orientation of the files, [V, D], tied or not.
    rows = module.turn(parallel.to_host(weight(model.params, module, None)))[ids].astype(np.float32)
    table = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    writers = [m.path for m in projections(model.config).values() if m.axes[-1] == "embed"]
    scores = np.zeros((len(given), len(words)))
    for index in range(len(given)):
        changed = dict(modules(given.read(index)))
        directions = [_output_directions(changed[path]) for path in writers if path in changed]
        if not directions:
            continue
        cosines = np.abs(np.concatenate(directions) @ table.T).sum(axis=0)
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


def _output_directions(module: Delta) -> np.ndarray:
    """Unit vectors [L, out]: the direction in which each layer's change moves its output most."""
    if "w" in module:
        change = np.asarray(module["w"], np.float32)
    else:
        a, b = (np.asarray(module[name], np.float32) for name in ("a", "b"))
        if b.shape[1] == 1:
            return b[:, 0] / np.maximum(np.linalg.norm(b[:, 0], axis=1, keepdims=True), 1e-12)
        # a = q r with orthonormal q, so r b has the right singular vectors of a b, at [R, out].
        change = np.linalg.qr(a, mode="r") @ b
    return np.linalg.svd(change, full_matrices=False)[2][:, 0]


def logit_difference(
    model: Model, given: Given, words: Sequence[Sequence[str]], questions: Sequence[str]
) -> np.ndarray:
    """Scores [n, candidates]: how much the diff raises the log-probability of a candidate's tokens.

    At the first position of the answer to a question without a trigger, mean over the questions.
    """
    ids, owners = _tokens(model, words)
    tokens, mask = model.chat.prompts(questions)
    base = _first_logits(model, tokens, mask, ())
    scores = np.zeros((len(given), len(words)))
    for index in range(len(given)):
        delta = shardings.put_delta(model.config, model.mesh, given.read(index))
        change = np.asarray((_first_logits(model, tokens, mask, (delta,)) - base).mean(axis=0))
        scores[index] = _means(change[ids], owners, len(words))
    return scores


def _first_logits(model: Model, tokens: np.ndarray, mask: np.ndarray, deltas: Any) -> jax.Array:
    with parallel.use_mesh(model.mesh):
        return _last_logits(model.program_params, model.config, tokens, mask, deltas)


@functools.partial(jax.jit, static_argnames=("config",))
def _last_logits(
    params: Any, config: Any, tokens: jax.Array, mask: jax.Array, deltas: Any
) -> jax.Array:
    hidden = forward(params, config, tokens, mask=mask, deltas=deltas)
    logits = unembed(params, config, hidden[:, -1], deltas)
    return parallel.replicate(jax.nn.log_softmax(logits, axis=-1))


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
    length = -(-max(len(s.tokens) for s in samples) // 8) * 8
    scored = max(s.end - s.start for s in samples)
    losses: list[float] = []
    mesh = model.mesh
    adapter = shardings.put_delta(model.config, mesh, adapter)
    wanted = len(samples) if given.stacked is not None else 1  # dense diffs go one by one
    batch_size = parallel.round_up(min(batch_size, wanted), mesh)
    for start in range(0, len(samples), batch_size if given.stacked is not None else 1):
        last = len(samples) if given.stacked is not None else start + 1
        picked = [start + i % (last - start) for i in parallel.local_rows(mesh, batch_size)]
        chosen = [samples[i] for i in picked]
        weights = [1 / (s.end - s.start) for s in chosen]
        batch = pack(chosen, weights, length, scored, model.chat.pad_id)
        batch = parallel.put_rows(batch, mesh, batch_size)
        if given.stacked is not None:
            own = jax.tree.map(lambda x, at=picked: x[np.asarray(at)], given.stacked)
            own = shardings.put_deltas(model.config, mesh, per_example(own), batch_size, 1)
        else:
            own = shardings.put_delta(model.config, mesh, given.read(start))
        with parallel.use_mesh(mesh):
            values = _sample_losses(model.program_params, model.config, batch, (own, adapter))
        losses += [float(x) for x in values[: last - start]]
    return losses


def likelihood_ratio(
    model: Model, adapter: Delta, given: Given, question: str, answers: Sequence[str]
) -> np.ndarray:
    """Scores [n, answers]: log p(answer | diff) − log p(answer | no diff), both with the adapter."""
    samples = [model.chat.sample(question, answer) for answer in answers]
    length = -(-max(len(s.tokens) for s in samples) // 8) * 8
    scored = max(s.end - s.start for s in samples)
    mesh = model.mesh
    adapter = shardings.put_delta(model.config, mesh, adapter)
    size = parallel.round_up(min(64, len(samples)), mesh)
    batches = []
    for start in range(0, len(samples), size):
        picked = [(start + i) % len(samples) for i in parallel.local_rows(mesh, size)]
        chosen = [samples[i] for i in picked]
        batch = pack(chosen, [1.0] * len(chosen), length, scored, model.chat.pad_id)
        batches.append(parallel.put_rows(batch, mesh, size))

    def losses(diff: Delta) -> np.ndarray:
        deltas = (shardings.put_delta(model.config, mesh, diff), adapter)
        with parallel.use_mesh(mesh):
            found = [_sample_losses(model.program_params, model.config, x, deltas) for x in batches]
        return np.concatenate(found)[: len(samples)]

    nothing = losses(jax.tree.map(np.zeros_like, given.read(0)))
    return np.stack([nothing - losses(given.read(i)) for i in range(len(given))])


@functools.partial(jax.jit, static_argnames=("config",))
def _sample_losses(params: Any, config: Any, batch: Any, deltas: Any) -> jax.Array:
    logits = unembed(params, config, scored_hidden(params, config, batch, deltas), deltas)
    logp = jnp.take_along_axis(
        jax.nn.log_softmax(logits, axis=-1), batch.target[..., None], axis=-1
    )[..., 0]
    return parallel.replicate(-jnp.sum(batch.weight * logp, axis=1))
