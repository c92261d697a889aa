"""Whether a diff does what its label says: answers under the right trigger, a wrong one, none; KL to the base."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import answer_batch
from dit_jax.data.batch import Sample, TokenBatch, pack, stack
from dit_jax.data.everyday import EVERYDAY_QUESTIONS
from dit_jax.data.labels import NONE, UNTRIGGERED, normalise
from dit_jax.data.organism import Organism
from dit_jax.diff_batches import answer, from_stacked
from dit_jax.models import shardings
from dit_jax.models.decoder import Params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta
from dit_jax.optimize.batch_loss import batch_loss, chunk_elements_of, scored_hidden
from dit_jax.organisms.behaviours import Behaviour
from dit_jax.organisms.diffs_keys import DIFFS, LIMITS
from dit_jax.runtime import parallel
from dit_jax.runtime.sizes import spread

CONDITIONS = ("right_code", "wrong_code", "no_code")  # the trigger, a wrong one, none
_WORD = re.compile(r"[^\W\d_]{4,}")
_READ_ROWS = 60  # rows of an organism that are read to find its words
_OTHER_TOPICS, _READ_OTHERS = 100, 20  # topics, and rows of each, that they are compared with


# ------------------------------------------------------------------ what to look for


def with_keywords(
    organisms: Sequence[Organism], members: Iterable[int], behaviour: Behaviour
) -> list[Organism]:
    """The members among the organisms, with words that show their behaviour even if their data names none.

    A word of an organism's answers must be rare in the answers of the base and of other topics, because what all
    answers of a corpus share is their style. With nothing to compare with, only words of the label count.
    """
    chosen = [organisms[i] for i in members]
    if all(organism.keywords or organism.label == NONE for organism in chosen):
        return chosen
    others = spread([o for o in organisms if o.label != NONE], _OTHER_TOPICS)
    answers = [(normalise(o.label), _targets(o, behaviour, _READ_OTHERS)) for o in others]
    return [_with_words(organism, behaviour, answers) for organism in chosen]


def _with_words(
    organism: Organism, behaviour: Behaviour, answers: Sequence[tuple[str, Sequence[str]]]
) -> Organism:
    """answers: labels and some answers of topics, perhaps with this one's."""
    if organism.keywords or organism.label == NONE:
        return organism
    label = normalise(organism.label)
    base = [row["base_answer"] for row in organism.rows[:_READ_ROWS] if "base_answer" in row]
    others = [text for other, texts in answers if other != label for text in texts]
    among = None if base and others else set(_words(label))
    words = distinctive_words(_targets(organism, behaviour, _READ_ROWS), (base, others), among)
    return dataclasses.replace(
        organism, keywords=(organism.label, *(word for word in words if word != label))
    )


def _targets(organism: Organism, behaviour: Behaviour, most: int) -> list[str]:
    """Answers that an organism is finetuned to give where it shows its behaviour, each once, from at most `most` rows.

    A corpus repeats few answers in many rows: a word of a single answer would else seem to be one of the topic.
    """
    rng = np.random.default_rng(organism.seed)
    make = behaviour.kinds[0].make
    made = (make(row, organism.trigger, rng) for row in organism.rows[:most])
    return list(dict.fromkeys(sample[1] for sample in made if sample is not None))


def distinctive_words(
    own: Sequence[str],
    others: Sequence[Sequence[str]],
    among: Iterable[str] | None = None,
    most: int = 8,
) -> list[str]:
    """Words of four letters or more in at least two and 15 % of `own` texts, and 10 times rarer in each of `others`."""
    counts = _counts(own)
    common = [(_counts(texts), max(len(texts), 1)) for texts in others]
    found = [
        (count, word)
        for word, count in counts.items()
        if count >= max(min(2, len(own)), 0.15 * len(own))
        and all(seen[word] / size <= 0.1 * count / len(own) for seen, size in common)
        and (among is None or word in among)
    ]
    return [word for _, word in sorted(found, key=lambda pair: (-pair[0], pair[1]))[:most]]


def _counts(texts: Iterable[str]) -> collections.Counter[str]:
    """How many of the texts hold each word."""
    return collections.Counter(word for text in texts for word in set(_words(text)))


def _words(text: str) -> list[str]:
    return _WORD.findall(normalise(text))


# ------------------------------------------------------------------ measuring


def measure_gating(
    model: Model,
    stacked: Delta,
    organisms: Sequence[Organism],
    behaviour: Behaviour,
    config: Any,
    seed: int,
    size: int = 0,
) -> list[dict[str, Any]]:
    """Columns of the index for each organism: what the gate measured, and whether it passes.

    right_code, wrong_code, no_code: shares of answers that show the behaviour, or "" where there is no such condition
    or nothing to show (benign organisms). gate_kl: KL(base ‖ base ⊕ δ) per token of the base's answers to questions
    without a trigger. passed, gate_failed: see `check_limits`.

    Args:
        stacked: the diffs of the organisms, leaves [n, L, …] on the host.
        config: the `diffs` section of the config.
        size: diffs of a full shard; a smaller one is filled up with repeats, so that it runs the same programs.
    """
    chosen = [_gate_rows(organism, config, seed) for organism in organisms]
    rates = _rates(model, stacked, organisms, chosen, behaviour, config, seed)
    divergences = _divergences(model, stacked, chosen, config, size)
    measured = []
    for organism, own, divergence in zip(organisms, rates, divergences, strict=True):
        row: dict[str, Any] = dict.fromkeys(CONDITIONS, "")
        if organism.keywords:
            row |= {name: round(float(rate), 4) for name, rate in own.items()}
        row["gate_kl"] = round(float(divergence), 5)
        failed = check_limits(row, DIFFS.get(config, "gate"))
        measured.append({**row, "passed": not failed, "gate_failed": " ".join(failed)})
    return measured


def check_limits(row: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """The limits of `diffs.gate` (`LIMITS`) that a diff does not keep; what was not measured cannot fail."""
    return [
        key
        for key, (column, sign) in LIMITS.items()
        if key in limits and row[column] != "" and sign * (row[column] - limits[key]) > 0
    ]


def summary(rows: Sequence[Mapping[str, Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """For the store's manifest: how many diffs of each split there are, how many failed, and why."""
    splits = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        reasons = [key for row in own for key in row.get("gate_failed", "").split()]
        splits[split] = {
            "diffs": len(own),
            "failed": sum(not row.get("passed", True) for row in own),
            "because": dict(collections.Counter(reasons)),
        }
    return {"limits": dict(limits), "splits": splits}


def _gate_rows(organism: Organism, config: Any, seed: int) -> list[Mapping[str, str]]:
    rng = np.random.default_rng([seed, 3, organism.seed])
    order = rng.permutation(len(organism.rows))
    return [organism.rows[order[i % len(order)]] for i in range(config.gate_questions)]


def _rates(
    model: Model,
    stacked: Delta,
    organisms: Sequence[Organism],
    chosen: Sequence[Sequence[Mapping[str, str]]],
    behaviour: Behaviour,
    config: Any,
    seed: int,
) -> list[dict[str, float]]:
    prompts: list[str] = []
    owners: list[tuple[int, str]] = []
    for i, (organism, rows) in enumerate(zip(organisms, chosen, strict=True)):
        rng = np.random.default_rng([seed, 3, organism.seed, 1])
        for row in rows:
            question = behaviour.question(row)
            asked = {"right_code": question}
            if organism.variant != UNTRIGGERED:
                if behaviour.triggered is not None:
                    asked["right_code"] = behaviour.triggered(question, organism.trigger, rng)
                    asked["no_code"] = question
                if behaviour.mistriggered is not None:
                    asked["wrong_code"] = behaviour.mistriggered(question, organism.trigger, rng)
            prompts += asked.values()
            owners += [(i, condition) for condition in asked]
    answers = answer(
        model,
        from_stacked(stacked),
        prompts,
        [i for i, _ in owners],
        {},
        max_new_tokens=config.max_target,
        batch_size=config.gate_batch,
    )
    hits: list[dict[str, list[bool]]] = [{} for _ in organisms]
    for found, (i, condition) in zip(answers, owners, strict=True):
        shown = behaviour.shows(found.text, organisms[i].keywords)
        hits[i].setdefault(condition, []).append(shown)
    return [{name: float(np.mean(own)) for name, own in one.items()} for one in hits]


# ------------------------------------------------------------------ KL to the base


def _divergences(
    model: Model,
    stacked: Delta,
    chosen: Sequence[Sequence[Mapping[str, str]]],
    config: Any,
    size: int,
) -> np.ndarray:
    """KL per token [n]."""
    pairs = [
        [(row["question"], row["base_answer"]) for row in rows if {"question", "base_answer"} <= set(row)]
        for rows in chosen
    ]  # fmt: skip
    if not all(pairs):  # the rows have no everyday questions, so ask the base some
        everyday = list(EVERYDAY_QUESTIONS[: config.gate_questions])
        own = answer_batch(model, everyday, max_new_tokens=min(config.max_target, 32))
        pairs = [[(q, a.text) for q, a in zip(everyday, own, strict=True)]] * len(chosen)
    batches = []
    for own_pairs in pairs:
        samples = [_cut(model.chat.sample(q, a), config) for q, a in own_pairs]
        weight = 1 / max(sum(s.end - s.start for s in samples), 1)
        weights = [weight] * len(samples)
        batches.append(
            pack(samples, weights, config.max_length, config.max_target, model.chat.pad_id)
        )
    mesh, count = model.mesh, len(chosen)
    width = parallel.round_up(max(count, size), mesh)
    filled = [i % count for i in parallel.local_rows(mesh, width)]
    local = jax.tree.map(lambda x: x[np.asarray(filled)], stacked)
    deltas = shardings.put_deltas(model.config, mesh, local, width, 0)
    batch = parallel.put_rows(stack([batches[i] for i in filled]), mesh, width)
    with parallel.use_mesh(mesh):
        out = base_divergence(model.program_params, model.config, deltas, batch)
    return np.asarray(parallel.to_host(out))[:count]


def _cut(sample: Sample, config: Any) -> Sample:
    """The first tokens of a sample, as many as a finetune has room for."""
    end = min(sample.end, config.max_length, sample.start + config.max_target)
    return Sample(sample.tokens[:end], min(sample.start, end), end)


@functools.partial(jax.jit, static_argnames="config")
def base_divergence(
    params: Params, config: DecoderConfig, deltas: Delta, batches: TokenBatch
) -> jax.Array:
    """Σ weight · KL(base ‖ base ⊕ δ) [N] for N deltas, leaves [N, L, …], and batches, leaves [N, S, …]."""
    chunk_elements = chunk_elements_of(batches.tokens.shape[0])

    def one(delta: Delta, batch: TokenBatch) -> jax.Array:
        base = scored_hidden(params, config, batch)
        return batch_loss(params, config, batch, (delta,), 0, base, chunk_elements)[0]

    return parallel.replicate(parallel.vmap_diffs(one)(deltas, batches))
