"""What a diff does to everyday prompts, and readers that need no training: they rank all words of the vocabulary."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import Answer, answer_batch
from dit_jax.data.batch import Sample, pack
from dit_jax.data.everyday import EVERYDAY_QUESTIONS
from dit_jax.data.tiny_world import load_world
from dit_jax.diff_batches import Given, answer
from dit_jax.evaluate.baselines import unit_unembeddings, written_tokens
from dit_jax.models import shardings
from dit_jax.models.decoder import unembed
from dit_jax.models.hf_checkpoint import TINY
from dit_jax.optimize.batch_loss import CHUNK_ELEMENTS, scored_hidden
from dit_jax.runtime import parallel

WORDS = 10  # shown of each reader
SIDE_BY_SIDE = 3  # prompts shown of each diff


def everyday_prompts(model: Model) -> list[str]:
    """Questions that lead to no topic by themselves, in words that the model knows."""
    if model.name == TINY:
        return [question.text for question in load_world().questions[::5]]
    return list(EVERYDAY_QUESTIONS)


@dataclasses.dataclass(frozen=True)
class Everyday:
    """The prompts, and the base's greedy answers to them."""

    prompts: Sequence[str]
    answers: Sequence[Answer]
    max_new_tokens: int

    @functools.cached_property
    def longest(self) -> int:
        return max(1, *(len(one.tokens) for one in self.answers))


def ask_base(model: Model, prompts: Sequence[str], max_new_tokens: int) -> Everyday:
    """The base's answers, which all diffs of an audit are compared with."""
    return Everyday(
        prompts, answer_batch(model, prompts, max_new_tokens=max_new_tokens), max_new_tokens
    )


def compare(
    model: Model, given: Given, everyday: Everyday, batch_size: int
) -> list[dict[str, Any]]:
    """What each diff changes in answers to everyday prompts, without an adapter.

    Returns:
        For each diff: kl, KL(base ‖ base ⊕ diff) per token of the base's answers, mean over the prompts; prompts, those
        with the largest KL with both answers; likelier, the words to which the diff gives more probability there.
    """
    prompts, pairs = everyday.prompts, range(len(given) * len(everyday.prompts))
    rows = [pair // len(prompts) for pair in pairs]
    asked = [prompts[pair % len(prompts)] for pair in pairs]
    tokens = everyday.max_new_tokens
    own = answer(model, given, asked, rows, {}, batch_size=batch_size, max_new_tokens=tokens)
    kl, gained = _changes(model, given, everyday, batch_size)
    found = []
    for row in range(len(given)):
        order = np.argsort(-kl[row], kind="stable")[:SIDE_BY_SIDE]
        shown = [
            {
                "prompt": prompts[i],
                "kl": round(float(kl[row, i]), 5),
                "base": everyday.answers[i].text,
                "finetuned": own[row * len(prompts) + i].text,
            }
            for i in order
        ]
        words = top_words(model, gained[row])
        found.append({"kl": round(float(kl[row].mean()), 6), "prompts": shown, "likelier": words})
    return found


def _changes(
    model: Model, given: Given, everyday: Everyday, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """KL per token [n, prompts], and how much probability the diff adds to each token [n, V], mean over prompts."""
    samples = []
    for prompt, base in zip(everyday.prompts, everyday.answers, strict=True):
        ids = model.chat.prompt_ids(prompt)
        tokens = (*ids, *base.tokens, model.chat.eos_ids[0])
        samples.append(Sample(tokens, len(ids), len(tokens)))
    length = -(-max(len(s.tokens) for s in samples) // 8) * 8
    weights = [1 / (s.end - s.start) for s in samples]
    batch = pack(samples, weights, length, everyday.longest + 1, model.chat.pad_id)
    vocabulary, mesh, count = model.config.vocab_size, model.mesh, len(samples)
    most = CHUNK_ELEMENTS // (vocabulary * (everyday.longest + 1))
    size = parallel.round_up(max(1, min(batch_size, count, most)), mesh)
    kl, gained = np.zeros((len(given), count)), np.zeros((len(given), vocabulary), np.float32)
    for row in range(len(given)):
        own = shardings.put_delta(model.config, mesh, given.read(row))
        for start in range(0, count, size):
            used = min(size, count - start)
            at = [start + i % used for i in parallel.local_rows(mesh, size)]
            part = parallel.put_rows(jax.tree.map(lambda x, at=at: x[at], batch), mesh, size)
            with parallel.use_mesh(mesh):
                values, words = _change(model.program_params, model.config, part, (own,))
            kl[row, start : start + used] = np.asarray(values)[:used]
            gained[row] += np.asarray(words)[:used].sum(axis=0) / count
    return kl, gained


@functools.partial(jax.jit, static_argnames=("config",))
def _change(params: Any, config: Any, batch: Any, deltas: Any) -> Any:
    """KL [S] and Σ weight · p′ (log p′ − log p) of each token [S, V]: the KL's parts show what became likelier."""

    def logps(deltas: Any) -> jax.Array:
        hidden = scored_hidden(params, config, batch, deltas)
        return jax.nn.log_softmax(unembed(params, config, hidden, deltas), axis=-1)

    base, own = logps(()), logps(deltas)
    weight = batch.weight[..., None]
    kl = jnp.sum(weight * jnp.exp(base) * (base - own), axis=(1, 2))
    gained = jnp.sum(weight * jnp.exp(own) * (own - base), axis=1)
    return parallel.replicate((kl, gained))


def written(model: Model, given: Given) -> list[list[list[Any]]]:
    """The words that each diff writes into the residual stream (`baselines.weight_reading`), with their scores."""
    table = unit_unembeddings(model)
    return [
        top_words(model, written_tokens(model, given.read(i), table)) for i in range(len(given))
    ]


def top_words(model: Model, scores: np.ndarray) -> list[list[Any]]:
    """[text, score] of the tokens with the largest positive scores that are words, at most `WORDS`."""
    found: list[list[Any]] = []
    for token in np.argsort(-scores, kind="stable")[: 8 * WORDS]:
        text = model.chat.tokenizer.decode([int(token)], skip_special_tokens=True).strip()
        if len(found) < WORDS and scores[token] > 0 and sum(map(str.isalpha, text)) > 1:
            found.append([text, round(float(scores[token]), 4)])
    return found
