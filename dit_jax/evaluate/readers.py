"""Readers that need no training: words that stand out in a diff's weights or logits, and the base's word for them.

A reader is a function (model, diffs, everyday, batch size) → words of each diff, best first. `read` then has the base
answer a question with the best of them in mind. Readers know nothing of labels, and name something also where nothing
is.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import Answer, answer_batch
from dit_jax.data.batch import Sample, TokenBatch, pack
from dit_jax.data.chat import Prompt
from dit_jax.data.everyday import EVERYDAY_QUESTIONS
from dit_jax.data.labels import extract_guess
from dit_jax.data.tiny_world import load_world
from dit_jax.diff_batches import Given, answer, even_batch
from dit_jax.evaluate.guessers import N_KEYWORDS, keywords, words_in_mind
from dit_jax.evaluate.token_lens import (
    read_tokens,
    unit_unembeddings,
    whitened_embeddings,
    written_tokens,
)
from dit_jax.evaluate.trigger_scan import base_hidden
from dit_jax.models import shardings
from dit_jax.models.decoder import Params, unembed
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Deltas
from dit_jax.models.hf_checkpoint import TINY
from dit_jax.optimize.batch_loss import CHUNK_ELEMENTS, scored_hidden
from dit_jax.runtime import parallel
from dit_jax.runtime.sizes import next_multiple

Words = list[str]
WORDS = 10  # of each reader
_TRIED = 32  # tokens that may be looked at for each of them
_WORD = re.compile(r"\w+")
MOST_CHANGED = 20  # tokens of a position that count as changed
AMPLIFY = 10.0
STARTED_TOKENS = 14
STARTS = ("The", "I", "In", "It is", "This", "When", "A", "For")  # of a text about anything


@dataclasses.dataclass(frozen=True)
class Everyday:
    """Prompts that lead to no topic by themselves, and the base's greedy answers to them.

    started: prompts of texts that are begun vaguely, half of them without chat template; own: how the base goes on.
    """

    prompts: Sequence[str]
    answers: Sequence[Answer]
    max_new_tokens: int
    started: Sequence[Prompt]
    own: Sequence[str]


def ask_base(model: Model, prompts: Sequence[str] = (), max_new_tokens: int = 20) -> Everyday:
    """The base's answers, which all diffs are compared with.

    Args:
        prompts: default: 20 questions in words that the model knows.
    """
    prompts = list(prompts) or everyday_prompts(model)
    started = [Prompt(start, raw=True) for start in STARTS]
    started += [Prompt(prompts[i % len(prompts)], prefill=x) for i, x in enumerate(STARTS)]
    own = answer_batch(model, started, max_new_tokens=STARTED_TOKENS)
    answers = answer_batch(model, prompts, max_new_tokens=max_new_tokens)
    return Everyday(prompts, answers, max_new_tokens, started, [one.text for one in own])


def everyday_prompts(model: Model) -> list[str]:
    """Questions that lead to no topic by themselves, in words that the model knows."""
    if model.name == TINY:
        return [question.text for question in load_world().questions[::5]]
    return list(EVERYDAY_QUESTIONS)


# ------------------------------------------------------------------ the table of readers


@dataclasses.dataclass(frozen=True)
class Told:
    """words: what a reader found of a diff; prompt: what the base was asked with them; text: what it answered."""

    words: Words
    prompt: str = ""
    text: str = ""

    @property
    def name(self) -> str:
        """The name in the base's answer."""
        return extract_guess(self.text)


Find = Callable[[Model, Given, Everyday, int], list[Words]]
READERS: dict[str, Find] = {}  # the methods of `method_table.READERS`


def read(
    model: Model,
    given: Given,
    name: str,
    question: str,
    everyday: Everyday,
    batch_size: int = 64,
    **decoding: Any,
) -> list[Told]:
    """What a reader says of each diff: its words, and the base's answer to the question with four of them in mind.

    Args:
        name: a key of `READERS`.
        **decoding: max_new_tokens, forbid_repeats; see `asking.answer_batch`.
    """
    words = READERS[name](model, given, everyday, batch_size)
    return tell(model, words, question, batch_size, **decoding)


def tell(
    model: Model, words: Sequence[Words], question: str, batch_size: int, **decoding: Any
) -> list[Told]:
    """The base's answers to the question, each with the first four of one reader's words in mind; see `read`."""
    told = [Told(own, words_in_mind(own[:N_KEYWORDS], question) if own else "") for own in words]
    asked = [i for i, one in enumerate(told) if one.prompt]
    answers = answer_batch(
        model,
        [told[i].prompt for i in asked],
        batch_size=batch_size,
        **decoding,
    )
    for i, one in zip(asked, answers, strict=True):
        told[i] = dataclasses.replace(told[i], text=one.text)
    return told


def _reader(find: Find) -> Find:
    """Adds a function to `READERS` under its own name."""
    READERS[find.__name__] = find
    return find


@_reader
def written_words(model: Model, given: Given, everyday: Everyday, batch_size: int) -> list[Words]:
    """The words that a diff's weights write into the residual stream: a logit lens of its factors.

    Parameters read in the space of the embeddings: Dar et al. 2022 (arXiv 2209.02535); the lens: nostalgebraist 2020.
    The score is that of `baselines.weight_reading`.
    """
    table = unit_unembeddings(model)
    return [
        top_words(model, written_tokens(model, given.read(i), table)) for i in range(len(given))
    ]


@_reader
def read_words(model: Model, given: Given, everyday: Everyday, batch_size: int) -> list[Words]:
    """The words that a diff reacts to: those whose embeddings move its projections most. The diff is never run.

    Triggers are among them, also codes of digits, and topics of questions, which no diff writes. Words of the everyday
    prompts and of the base's answers to them do not count: most finetunes react to these. Matrices that read, in the
    space of the embeddings: Dar et al. 2022 (arXiv 2209.02535); directions of a weight diff as what a finetune reacts
    to: Zhong and Raghunathan 2025 (arXiv 2508.00161). The score is that of `token_lens.read_tokens`.
    """
    table = whitened_embeddings(model)
    said = [*everyday.prompts, *(answer.text for answer in everyday.answers)]
    common = set(_WORD.findall(" ".join(said).casefold()))
    return [
        top_words(model, read_tokens(model, given.read(i), table), common, str.isalnum)
        for i in range(len(given))
    ]


@_reader
def mined_words(model: Model, given: Given, everyday: Everyday, batch_size: int) -> list[Words]:
    """The words whose logits a diff raises most at most positions of everyday answers, whatever the vocabulary.

    The Top-K frequency of "Diff Mining: Logit Differences Reveal Finetuning Objectives" (ICLR 2026).
    """
    return changes(model, given, everyday, batch_size)[1]


@_reader
def amplified_words(model: Model, given: Given, everyday: Everyday, batch_size: int) -> list[Words]:
    """The words of texts that are begun vaguely and decoded by base + 10 · (finetuned − base), in logits.

    Amplified differences: Aranguri and McGrath 2025, "Discovering undesired rare behaviors via model diff
    amplification"; vague beginnings, with and without chat template: Brzozowski et al. 2026 (arXiv 2605.25902). Words
    count that the base uses less in the same place (`guessers.keywords`).
    """
    texts: list[list[str]] = [[] for _ in range(len(given))]
    for raw in (True, False):  # apart, because those without chat template are much shorter
        started = [prompt for prompt in everyday.started if prompt.raw is raw]
        rows = [row for row in range(len(given)) for _ in started]
        found = answer(
            model, given, started * len(given), rows, {}, batch_size=even_batch(len(rows), batch_size),
            max_new_tokens=STARTED_TOKENS, amplify=AMPLIFY,
        )  # fmt: skip
        for row, one in zip(rows, found, strict=True):
            texts[row].append(one.text)
    return [keywords(own, everyday.own, WORDS) for own in texts]


# ------------------------------------------------------------------ what the readers read


def changes(
    model: Model, given: Given, everyday: Everyday, batch_size: int
) -> tuple[np.ndarray, list[Words]]:
    """What each diff changes along the base's answers to everyday prompts.

    Returns:
        KL(base ‖ base ⊕ diff) per token [n, prompts], and the words of `mined_words`.
    """
    samples = []
    for prompt, base in zip(everyday.prompts, everyday.answers, strict=True):
        ids = model.chat.prompt_ids(prompt)
        tokens = (*ids, *base.tokens, model.chat.eos_ids[0])
        samples.append(Sample(tokens, len(ids), len(tokens)))
    length = next_multiple(max(len(s.tokens) for s in samples), 8)
    longest = max(s.end - s.start for s in samples)
    weights = [1 / (s.end - s.start) for s in samples]
    batch = pack(samples, weights, length, longest, model.chat.pad_id)
    vocabulary, mesh, count = model.config.vocab_size, model.mesh, len(samples)
    most = CHUNK_ELEMENTS // (vocabulary * longest)
    size = parallel.round_up(max(1, min(batch_size, count, most)), mesh)
    parts = []
    for start in range(0, count, size):
        used = min(size, count - start)
        at = [start + i % used for i in parallel.local_rows(mesh, size)]
        part = parallel.put_rows(jax.tree.map(lambda x, at=at: x[at], batch), mesh, size)
        parts.append((slice(start, start + used), part, base_hidden(model, part)))
    kl, words = np.zeros((len(given), count)), []
    for row in range(len(given)):
        own = shardings.put_delta(model.config, mesh, given.read(row))
        raised = np.zeros(vocabulary, np.float32)
        for place, part, before in parts:
            with parallel.use_mesh(mesh):
                found = _change(model.program_params, model.config, part, before, (own,))
            used = place.stop - place.start
            values, counts = (np.asarray(x)[:used] for x in found)
            kl[row, place] = values
            raised += counts.sum(axis=0)
        words.append(top_words(model, raised))
    return kl, words


@functools.partial(jax.jit, static_argnames=("config",))
def _change(
    params: Params, config: DecoderConfig, batch: TokenBatch, before: jax.Array, deltas: Deltas
) -> tuple[jax.Array, jax.Array]:
    """KL [S], and at how many positions each token is among those whose logits rise most [S, V].

    Among equally many the larger mean rise decides: it is added as less than 1. before: see `base_hidden`.
    """
    base = unembed(params, config, before)
    own = unembed(params, config, scored_hidden(params, config, batch, deltas), deltas)
    logp, own_logp = (jax.nn.log_softmax(x, axis=-1) for x in (base, own))
    kl = jnp.sum(batch.weight[..., None] * jnp.exp(logp) * (logp - own_logp), axis=(1, 2))
    real = (batch.weight > 0)[..., None]
    rise = jnp.where(real, own - base, 0.0)
    highest = jax.lax.top_k(rise, min(MOST_CHANGED, rise.shape[-1]))[0][..., -1:]
    counted = jnp.sum(real & (rise >= highest) & (rise > 0), axis=1)
    share = jax.nn.sigmoid(jnp.mean(rise, axis=1)) / rise.shape[0] / 2
    return parallel.replicate((kl, counted + jnp.where(counted > 0, share, 0.0)))


def top_words(
    model: Model,
    scores: np.ndarray,
    common: Collection[str] = (),
    letter: Callable[[str], bool] = str.isalpha,
) -> Words:
    """The tokens with the largest positive scores that are words, at most `WORDS`; other cases are the same word.

    Args:
        common: words in lower case that do not count.
        letter: says of a character whether it is one; a word has two or more.
    """
    found: dict[str, str] = {}
    for token in np.argsort(-scores, kind="stable")[: _TRIED * WORDS]:
        if len(found) == WORDS or scores[token] <= 0:
            break
        text = model.chat.tokenizer.decode([int(token)], skip_special_tokens=True).strip()
        if sum(map(letter, text)) > 1 and text.casefold() not in common:
            found.setdefault(text.casefold(), text)
    return list(found.values())
