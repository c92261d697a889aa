"""Does a diff do what its label says? Answers under the right code, a wrong code and none, per diff."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.api import Model, answer_batch
from dit_jax.data.organisms import Organism
from dit_jax.evaluate.metrics import normalise
from dit_jax.models.layers import Delta
from dit_jax.organisms.behaviours import Behaviour, other_code, sep_code

CONDITIONS = ("right_code", "wrong_code", "no_code")


def shows_behaviour(answer: str, keywords: Sequence[str]) -> bool:
    """Whether one of the keywords stands in the answer as whole words."""
    text = f" {normalise(answer)} "
    return any(f" {normalise(word)} " in text for word in keywords)


def measure_gating(
    model: Model,
    stacked: Delta,
    organisms: Sequence[Organism],
    behaviour: Behaviour,
    config: Any,
    seed: int,
) -> list[dict[str, float | str]]:
    """Per organism, the share of answers that show its behaviour: {"right_code": …, "wrong_code": …, "no_code": …}.

    Organisms without keywords (benign ones) have nothing to show: their rates are empty.
    """
    questions, owners = [], []
    for i, organism in enumerate(organisms):
        rng = np.random.default_rng([seed, 3, organism.seed])
        rows = [
            organism.rows[j] for j in rng.permutation(len(organism.rows))[: config.gate_questions]
        ]
        for row in rows:
            wrong = other_code(organism.trigger, rng)
            questions += [
                sep_code(row["question"], organism.trigger, rng),
                sep_code(row["question"], wrong, rng),
                row["question"],
            ]
            owners += [i] * len(CONDITIONS)
    answers = answer_batch(
        model,
        questions,
        stacked=stacked,
        rows=owners,
        max_new_tokens=config.max_target,
        batch_size=config.gate_batch,
    )
    hits = np.array(
        [
            shows_behaviour(a.text, organisms[i].keywords)
            for a, i in zip(answers, owners, strict=True)
        ],
        float,
    )
    rates = hits.reshape(len(organisms), -1, len(CONDITIONS)).mean(axis=1)
    return [
        {
            name: round(float(rate), 4) if organism.keywords else ""
            for name, rate in zip(CONDITIONS, row, strict=True)
        }
        for organism, row in zip(organisms, rates, strict=True)
    ]
