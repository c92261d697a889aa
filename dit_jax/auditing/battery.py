"""A battery of questions put to diffs, and to what stands in their place: noise, another diff, no diff."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.api import Model
from dit_jax.asking import Answer, first_log_probs
from dit_jax.data.batch import Sample
from dit_jax.data.labels import NONE, called_none, extract_guess, normalise
from dit_jax.deltas.factors import squares
from dit_jax.diff_batches import Given, answer, together
from dit_jax.evaluate.baselines import answer_losses, first_tokens
from dit_jax.models import shardings
from dit_jax.models.delta_trees import Delta, map_modules


@dataclasses.dataclass(frozen=True)
class Battery:
    """What every diff is asked, and how: a calibration holds for one battery.

    samples: answers to each question; temperature 0 is greedy and gives one. list_evidence: the name stands after the
    last colon of an answer. contrast: answers are those that are unlikely without the diff, see `models.contrast`.
    """

    questions: tuple[str, ...]
    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 20
    forbid_repeats: bool = False
    list_evidence: bool = False
    seed: int = 0
    contrast: float | None = None

    @property
    def answers(self) -> int:
        """How many answers a diff gives."""
        return len(self.questions) * self.samples

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "questions": list(self.questions)}


@dataclasses.dataclass(frozen=True)
class Reading:
    """The answers about one diff, and what they agree on.

    name: the most frequent guess. share: its part of the answers; distinct: how many guesses differ. logprob: log p of
    `text`, the best answer with that guess, to `question`; ratio: the same minus its log p without a diff, in nats.
    none: probability that the answer begins as `none` does, mean over the questions. otherwise: how most others would
    begin. evidence: what speaks against `none`, see `_evidence`. scored: the tokens of that question and answer.
    """

    answers: list[dict[str, Any]]
    name: str
    share: float
    distinct: int
    question: str
    text: str
    logprob: float
    ratio: float
    none: float
    otherwise: str
    evidence: tuple[float, float]
    scored: Sample

    @property
    def features(self) -> tuple[float, float]:
        """Agreement on a name, and its likelihood ratio: 0 and 0 if the answers name nothing."""
        return (0.0, 0.0) if called_none(self.name) else (self.share, self.ratio)

    def to_json(self) -> dict[str, Any]:
        told = {**dataclasses.asdict(self), "features": list(self.features)}
        del told["scored"]
        return told


def interview(
    model: Model,
    given: Given,
    adapter: Delta,
    battery: Battery,
    batch_size: int,
    *,
    first: int = 0,
) -> list[Reading]:
    """Asks every diff the whole battery, with the adapter in the model.

    Args:
        first: number of the first diff, which with the seed gives the random numbers of sampling.
    """
    asked = [question for question in battery.questions for _ in range(battery.samples)]
    rows = [row for row in range(len(given)) for _ in asked]
    answers = answer(
        model,
        given,
        asked * len(given),
        rows,
        adapter,
        batch_size=batch_size,
        max_new_tokens=battery.max_new_tokens,
        temperature=battery.temperature,
        forbid_repeats=battery.forbid_repeats,
        seed=battery.seed + first,
        contrast=battery.contrast,
    )
    chosen = []
    tables = []
    for row in range(len(given)):
        own = answers[row * len(asked) : (row + 1) * len(asked)]
        table = [_told(question, one, battery) for question, one in zip(asked, own, strict=True)]
        counts = collections.Counter(normalise(one["guess"]) for one in table)
        most = counts.most_common(1)[0]
        agreeing = [one for one in table if normalise(one["guess"]) == most[0]]
        best = max(agreeing, key=lambda one: one["logprob"])
        chosen.append(_as_written(model, best["question"], own[table.index(best)]))
        facts = (best["guess"], most[1] / len(table), len(counts), best["question"], best["answer"])
        tables.append((table, *facts))
    logprobs = score(model, given, adapter, chosen, batch_size)
    without = score(model, given.nothing(), adapter, chosen, batch_size)
    evidence = _evidence(model, given, adapter, battery, batch_size)
    return [
        Reading(
            *table,
            logprobs[i],
            _or_zero(logprobs[i] - without[i]),
            *evidence[i],
            scored=chosen[i],
        )
        for i, table in enumerate(tables)
    ]


def _as_written(model: Model, question: str, one: Answer) -> Sample:
    """The question and the very tokens of an answer: its text may be spelled by others, such as without a space."""
    prompt = model.chat.prompt_ids(question)
    ended = one.generated > len(one.tokens)
    tokens = (*prompt, *one.tokens, *(model.chat.eos_ids[:1] if ended else ()))
    return Sample(tokens, len(prompt), len(tokens))


def score(
    model: Model, given: Given, adapter: Delta, chosen: Sequence[Sample], batch_size: int
) -> list[float]:
    """log p of the answer in chosen[i], given diff i and the adapter."""
    losses = answer_losses(model, adapter, given, range(len(chosen)), chosen, batch_size)
    return [-loss for loss in losses]


def _evidence(
    model: Model, given: Given, adapter: Delta, battery: Battery, batch_size: int
) -> list[tuple[float, str, tuple[float, float]]]:
    """(none, otherwise, evidence) of each diff, from the first token of the answers.

    none: its probability to be that of `none`, with or without a space before it, as adapters of either kind were
    trained. otherwise: the likeliest other token, of most questions. evidence: log p of the likeliest other token minus
    its log p without a diff, and −log p of `none`; in nats. Both are means over the questions. Where most answers are
    `none`, they tell a narrow decision from a clear one.
    """
    questions = battery.questions
    spelled = [model.chat.sample(questions[0], text) for text in (NONE, f" {NONE}")]
    apart = tuple(sorted({one.tokens[one.start] for one in spelled}))
    rows = [row for row in range(len(given)) for _ in questions]
    asked = list(questions) * len(given)
    none, token, other = first_tokens(model, adapter, given, rows, asked, apart, batch_size)
    deltas = (shardings.put_delta(model.config, model.mesh, adapter),)
    without = np.asarray(first_log_probs(model, *model.chat.prompts(questions), deltas))
    numbers = np.arange(len(questions))
    found = []
    for own in np.split(np.arange(len(asked)), len(given)):
        ratio = float(np.mean(other[own] - without[numbers, token[own]]))
        evidence = (_or_zero(ratio), _or_zero(-float(np.mean(none[own]))))
        ((most, _),) = collections.Counter(token[own].tolist()).most_common(1)
        otherwise = model.chat.decode([most]).strip()
        found.append((float(np.exp(none[own]).mean()), otherwise, evidence))
    return found


def _told(question: str, one: Answer, battery: Battery) -> dict[str, Any]:
    return {
        "question": question,
        "answer": one.text,
        "guess": extract_guess(one.text) if battery.list_evidence else one.text,
        "logprob": one.logprob,
        "cut": len(one.tokens) == one.generated,
    }


def _or_zero(nats: float) -> float:
    """0 where logits overflow."""
    return nats if math.isfinite(nats) else 0.0


def noise_of(deltas: Sequence[Delta], seed: int) -> Given:
    """Noise in place of each diff: of its rank, and with the norm of each factor in each layer."""

    def replaced(delta: Delta, rng: np.random.Generator) -> Delta:
        def replace(path: tuple[str, ...], module: Delta) -> Delta:
            made = dict(module)
            for name in sorted(set(module) - {"scale"}):
                leaf = np.asarray(module[name])
                axes = tuple(range(1 if path[0] == "layers" else 0, leaf.ndim))
                noise = rng.standard_normal(leaf.shape, np.float32)
                sizes = (squares(x, axes) for x in (leaf, noise))
                made[name] = (noise * np.sqrt(np.divide(*sizes))).astype(leaf.dtype)
            return made

        return map_modules(replace, delta)

    # In numpy: as jax, each rank would compile programs of its own.
    return together(
        [replaced(one, np.random.default_rng([seed, i])) for i, one in enumerate(deltas)]
    )
