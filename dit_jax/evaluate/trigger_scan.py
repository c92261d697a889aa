"""Finds a diff's trigger without training: with it in the prompt, the finetuned model leaves its base.

An adapter that is trained to say triggers finds none (paper, section 5.6: 0 of 100). But a finetune must act under its
trigger. So candidates are tried: each is put into everyday questions, and scored by KL(base ⊕ diff ‖ base) along the
start of the base's answers to the plain questions. This needs no label and no adapter, but a family to which the
trigger belongs: those of all known behaviours are tried.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import answer_batch
from dit_jax.data.batch import Sample, TokenBatch, pack
from dit_jax.diff_batches import Given, even_batch
from dit_jax.errors import DitError, did_you_mean
from dit_jax.models import shardings
from dit_jax.models.decoder import Params, unembed
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta
from dit_jax.optimize.batch_loss import CHUNK_ELEMENTS, scored_hidden
from dit_jax.organisms.behaviours import BEHAVIOURS, NO_TRIGGER, known_behaviour, possible_triggers
from dit_jax.runtime import parallel
from dit_jax.runtime.sizes import next_multiple

QUESTIONS = 5  # the first one with every candidate, the others with the best ones
KEPT = 15  # of these, beside the plain questions
ANSWER_TOKENS = 8  # of each answer's start
PLAIN = 0  # the place of the plain questions among the candidates
# Any prefix moves the answers of a finetune a little, and moves all answers of one that shows its behaviour always. So
# a trigger must move them by at least so many nats, and so many times as much as what it is compared with.
LEAST_NATS = 1.0
LEAST_TIMES = 3.0


class Candidate(NamedTuple):
    """A trigger of a behaviour, and questions with it in them; `NO_TRIGGER`: the plain questions."""

    behaviour: str
    trigger: str
    prompts: tuple[str, ...]


def candidates(questions: Sequence[str], behaviours: Sequence[str] = ()) -> list[Candidate]:
    """The plain questions first, then every trigger of these behaviours; default: of all that are registered.

    Raises:
        DitError: a behaviour is unknown, or none of them has triggers.
    """
    found = {tuple(questions): Candidate("", NO_TRIGGER, tuple(questions))}
    for name in dict.fromkeys(behaviours or BEHAVIOURS):
        behaviour = known_behaviour(name)
        if behaviour is None:
            hint = did_you_mean(name, BEHAVIOURS, f": choose from {', '.join(BEHAVIOURS)}")
            raise DitError(f"there is no behaviour {name!r}, whose triggers could be tried{hint}")
        if behaviour.triggered is None:
            continue
        for trigger in possible_triggers(behaviour):
            rng = np.random.default_rng(0)  # what is random in a prompt is the same for all
            prompts = tuple(behaviour.triggered(question, trigger, rng) for question in questions)
            # Behaviours that share their triggers are tried once.
            found.setdefault(prompts, Candidate(behaviour.name, trigger, prompts))
    if len(found) == 1:
        names = ", ".join(behaviours)
        raise DitError(f"{names}: no trigger to try: name a behaviour that has one")
    return list(found.values())


def passes(count: int, questions: int) -> int:
    """Forward passes that the scan of one diff with this many candidates costs, those of the base included."""
    kept = min(count, KEPT + 1)
    return count + 2 * kept * (questions - 1)


def scan(
    model: Model, given: Given, tried: Sequence[Candidate], batch_size: int = 256
) -> np.ndarray:
    """Scores [n, C]: nats per question by which each of C candidates moves the starts of the answers.

    The first question screens all candidates. The plain questions and the `KEPT` best candidates are then asked the
    others, and -inf is the score of the rest. Each diff is read once; `passes` says what it costs.

    Args:
        tried: from `candidates`.
    """
    starts = answer_starts(model, tried[PLAIN].prompts)
    prompts = [prompt for candidate in tried for prompt in candidate.prompts]
    longest = max(len(model.chat.prompt_ids(prompt)) for prompt in prompts) + ANSWER_TOKENS
    batched = functools.partial(_batches, model, longest, batch_size)
    places = [(candidate, 0) for candidate in range(len(tried))]
    # Words that the tokenizer does not know are one token: of candidates that are the same to it, the first one counts.
    alike: dict[tuple[int, ...], int] = {}
    passed_over = {PLAIN}
    for c in range(1, len(tried)):
        if alike.setdefault(model.chat.prompt_ids(tried[c].prompts[0]), c) != c:
            passed_over.add(c)
    screening = batched(_samples(model, tried, starts, places))
    before = [base_hidden(model, batch) for batch in screening]
    scores = np.full((len(given), len(tried)), -np.inf)
    for index in range(len(given)):
        delta = shardings.put_delta(model.config, model.mesh, given.read(index))
        first = _nats(model, screening, before, delta)[: len(tried)]
        order = np.argsort(-first, kind="stable")
        kept = [PLAIN, *[c for c in order if c not in passed_over][:KEPT]]
        places = [(c, q) for c in kept for q in range(1, len(starts))]
        nats = first[kept]
        if places:
            batches = batched(_samples(model, tried, starts, places))
            own = _nats(model, batches, [base_hidden(model, batch) for batch in batches], delta)
            nats = nats + own[: len(places)].reshape(len(kept), -1).sum(axis=1)
        scores[index, kept] = nats / len(starts)
    return scores


@dataclasses.dataclass(frozen=True)
class Found:
    """What a scan found of a diff.

    candidate: the trigger, or the plain questions if nothing stands out. nats: per question, of the best candidate but
    these; others: of the plain questions or, if it is more, the median of the next best. best: the places of the
    candidates, those with the largest scores first.
    """

    candidate: Candidate
    nats: float
    others: float
    best: np.ndarray

    @property
    def stands_out(self) -> float:
        """How many times as much as the others the best candidate moves the answers; 0: by less than `LEAST_NATS`."""
        return self.nats / max(self.others, 1e-3) if self.nats >= LEAST_NATS else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "behaviour": self.candidate.behaviour,
            "trigger": self.candidate.trigger,
            "nats": round(self.nats, 4),
            "others": round(self.others, 4),
            "candidates": len(self.best),
        }


def find(scores: np.ndarray, tried: Sequence[Candidate]) -> list[Found]:
    """What scores [n, C] of `scan` say of each diff."""
    found = []
    for row in scores:
        order = np.argsort(-row, kind="stable")
        first, *rest = (int(i) for i in order if i != PLAIN and np.isfinite(row[i]))
        others = float(max(row[PLAIN], np.median(row[rest]) if rest else 0.0))
        one = Found(tried[first], float(row[first]), others, order)
        if one.stands_out < LEAST_TIMES:
            one = dataclasses.replace(one, candidate=tried[PLAIN])
        found.append(one)
    return found


# ------------------------------------------------------------------ divergences


def answer_starts(model: Model, questions: Sequence[str]) -> list[tuple[int, ...]]:
    """The first tokens of the base's answers, filled up with ends of turn."""
    answers = answer_batch(model, questions, max_new_tokens=ANSWER_TOKENS)
    ends = model.chat.eos_ids[:1] * ANSWER_TOKENS
    return [(*one.tokens, *ends)[:ANSWER_TOKENS] for one in answers]


def _samples(
    model: Model,
    tried: Sequence[Candidate],
    starts: Sequence[tuple[int, ...]],
    places: Sequence[tuple[int, int]],
) -> list[Sample]:
    """The prompts of these (candidate, question), each with the start of the answer, which is scored."""
    samples = []
    for candidate, question in places:
        ids = model.chat.prompt_ids(tried[candidate].prompts[question])
        tokens = (*ids, *starts[question])
        samples.append(Sample(tokens, len(ids), len(tokens)))
    return samples


def _batches(
    model: Model, longest: int, batch_size: int, samples: Sequence[Sample]
) -> list[TokenBatch]:
    """Batches of one size: the first samples fill up the last one. longest: the most tokens of a sample."""
    mesh, length = model.mesh, next_multiple(longest, 8)
    most = CHUNK_ELEMENTS // (model.config.vocab_size * ANSWER_TOKENS)
    size = parallel.round_up(even_batch(len(samples), max(1, min(batch_size, most))), mesh)
    batches = []
    for start in range(0, len(samples), size):
        rows = [samples[(start + i) % len(samples)] for i in parallel.local_rows(mesh, size)]
        batch = pack(rows, [1.0] * len(rows), length, ANSWER_TOKENS, model.chat.pad_id)
        batches.append(parallel.put_rows(batch, mesh, size))
    return batches


def base_hidden(model: Model, batch: TokenBatch) -> jax.Array:
    """The base's hidden states [S, M, D] at the scored positions."""
    with parallel.use_mesh(model.mesh):
        return _scored_hidden(model.program_params, model.config, batch)


def _nats(
    model: Model, batches: Sequence[TokenBatch], before: Sequence[jax.Array], delta: Delta
) -> np.ndarray:
    with parallel.use_mesh(model.mesh):
        moved = [
            _divergence(model.program_params, model.config, batch, base, delta)
            for batch, base in zip(batches, before, strict=True)
        ]
    return np.concatenate([np.asarray(part) for part in moved])


@functools.partial(jax.jit, static_argnames=("config",))
def _scored_hidden(params: Params, config: DecoderConfig, batch: TokenBatch) -> jax.Array:
    return scored_hidden(params, config, batch)


@functools.partial(jax.jit, static_argnames=("config",))
def _divergence(
    params: Params, config: DecoderConfig, batch: TokenBatch, before: jax.Array, delta: Delta
) -> jax.Array:
    """KL(base ⊕ delta ‖ base) [S], summed over the scored positions; `before`: the base's hidden states there."""
    hidden = scored_hidden(params, config, batch, (delta,))
    own, base = (
        jax.nn.log_softmax(unembed(params, config, x, deltas), axis=-1)
        for x, deltas in ((hidden, (delta,)), (before, ()))
    )
    return parallel.replicate(jnp.sum(jnp.exp(own) * (own - base), axis=(1, 2)))
