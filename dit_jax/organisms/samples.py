"""Samples of a finetune: those of every step, their widths and the factors of their losses."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dit_jax.data.batch import TokenBatch, pack, stack
from dit_jax.data.chat import Chat
from dit_jax.data.organism import Organism
from dit_jax.errors import DitError
from dit_jax.models.attention import Segments
from dit_jax.organisms.behaviours.behaviour import TO_BASE, Behaviour
from dit_jax.organisms.diffs_keys import DIFFS

MAX_SAMPLES = 1000  # samples of one kind in one step


def finetuning_batches(
    organism: Organism,
    behaviour: Behaviour,
    chat: Chat,
    config: Any,
    rng: np.random.Generator,
    of_teacher: bool = False,
) -> TokenBatch:
    """All batches of one finetune, leaves [steps, S, …].

    With `of_teacher` taught samples have the prompt that the base answers. Their scored tokens are the same.

    Each step takes `config.samples_per_step[kind]` rows for each kind of sample, from shuffled epochs. The loss of a
    sample is the mean over its tokens times 3 λ / Σ λ (paper, section 4), so that a diff depends on its own data only.
    """
    factors = sample_factors(behaviour, config)
    widths = sample_widths(behaviour, config)
    steps = []
    for step in sample_texts(organism, behaviour, config, rng):
        samples, weights = [], []
        for ((question, answer, *other), counts), factor in zip(step, factors, strict=True):
            asked = other[0] if of_teacher and other else question
            sample = chat.sample(asked, answer, end=config.score_end)
            samples.append(sample)
            weights.append(counts * factor / (sample.end - sample.start))
        batch = pack(samples, weights, config.max_length, config.max_target, chat.pad_id, widths)
        steps.append(batch)
    return stack(steps)


def sample_texts(
    organism: Organism, behaviour: Behaviour, config: Any, rng: np.random.Generator
) -> Iterator[list[tuple[tuple[str, ...], bool]]]:
    """The samples of each step of a finetune: what `SampleKind.make` gave, and whether it counts."""
    kinds, counts = behaviour.kinds, config.samples_per_step
    per_step = max(counts[kind.name] for kind in kinds)
    epochs = -(-config.steps * per_step // len(organism.rows))
    order = np.concatenate([rng.permutation(len(organism.rows)) for _ in range(epochs)])
    for step in range(config.steps):
        rows = [organism.rows[i] for i in order[step * per_step : (step + 1) * per_step]]
        samples = []
        for kind in kinds:
            for row in rows[: counts[kind.name]]:
                made = kind.make(row, organism.trigger, rng)
                samples.append((made or (row["question"], row["base_answer"]), made is not None))
        yield samples


def sample_widths(behaviour: Behaviour, config: Any) -> Segments:
    """(tokens, scored tokens) that each sample of a step may have: `config.widths` of its kind, or the maxima.

    Raises:
        DitError: widths are given for an unknown kind, or are not two numbers within the maxima.
    """
    largest = (config.max_length, config.max_target)
    own = DIFFS.get(config, "widths")
    unknown = set(own) - {kind.name for kind in behaviour.kinds}
    if unknown:
        raise DitError(
            f"config key 'diffs.widths.{min(unknown)}': behaviour {behaviour.name} has the kinds of samples "
            f"{_names(behaviour)}"
        )
    for name, pair in own.items():
        sizes = tuple(pair) if isinstance(pair, Sequence) else (pair,)
        fits = all(
            isinstance(size, int) and 1 <= size <= most
            for size, most in zip(sizes, largest, strict=False)
        )
        if len(sizes) != 2 or not fits:
            raise DitError(
                f"config key 'diffs.widths.{name}' is {sizes}: give tokens and scored tokens, from 1 up to "
                f"diffs.max_length and diffs.max_target, which are {largest}"
            )
    return tuple(
        tuple(own.get(kind.name, largest))
        for kind in behaviour.kinds
        for _ in range(config.samples_per_step[kind.name])
    )


def num_ce_samples(behaviour: Behaviour, config: Any) -> int:
    """How many samples of a step have a target of their own, and no KL; they come first."""
    return sum(
        config.samples_per_step[kind.name] for kind in behaviour.kinds if kind.loss not in TO_BASE
    )


def preference_beta(behaviour: Behaviour, config: Any) -> float:
    """β of pairs of answers; 0 for a behaviour without them."""
    return float(DIFFS.get(config, "preference_beta")) if behaviour.paired else 0.0


def check_samples(
    behaviour: Behaviour, config: Any, keys: Sequence[str] = ("samples_per_step", "loss_weights")
) -> None:
    """Raises DitError unless the config gives samples and losses to the behaviour's kinds of samples.

    Args:
        config: the `diffs` section of the config.
        keys: which of its keys to check; a plan needs only the samples.
    """
    names = [kind.name for kind in behaviour.kinds]
    for key, kinds, most, what in (
        ("samples_per_step", int, MAX_SAMPLES, f"a whole number from 0 to {MAX_SAMPLES}"),
        ("loss_weights", int | float, sys.float_info.max, "a number from 0 up"),
    ):
        if key not in keys:
            continue
        for name in dict.fromkeys((*names, *config[key])):
            if name not in names or name not in config[key]:
                wrong = "missing" if name in names else "of no use"
                raise DitError(
                    f"config key 'diffs.{key}.{name}' is {wrong}: behaviour {behaviour.name} has the kinds of "
                    f"samples {_names(behaviour)}"
                )
            value = config[key][name]
            if not isinstance(value, kinds) or isinstance(value, bool) or not 0 <= value <= most:
                raise DitError(f"config key 'diffs.{key}.{name}' must be {what}, not {value!r}")
    if not any(all(config[key][kind.name] for key in keys) for kind in behaviour.kinds):
        named = " and ".join(f"'diffs.{key}'" for key in keys)
        raise DitError(
            f"config keys {named} leave a step without a loss: give one of {_names(behaviour)} more than 0 there"
        )
    if behaviour.paired and "samples_per_step" in keys:
        better, worse = (config.samples_per_step[name] for name in names[:2])
        if better != worse or config.reference_losses:
            raise DitError(
                f"config keys 'diffs.samples_per_step': a step of behaviour {behaviour.name} has as many {names[0]} as "
                f"{names[1]}, and diffs.reference_losses is False"
            )
    sample_widths(behaviour, config)


def _names(behaviour: Behaviour) -> str:
    return ", ".join(kind.name for kind in behaviour.kinds)


def check_behaviour(behaviour: Behaviour, organisms: Sequence[Organism], config: Any) -> None:
    """Raises DitError if the config or the data lack what the behaviour's kinds of samples need."""
    check_samples(behaviour, config)
    for organism in organisms[:1]:
        rng = np.random.default_rng(0)
        try:
            for kind in behaviour.kinds:
                kind.make(organism.rows[0], behaviour.trigger or organism.trigger, rng)
        except KeyError as error:
            raise DitError(
                f"behaviour {behaviour.name} needs a column {error} of the data, which has "
                f"{', '.join(organism.rows[0])}: set data.kind or data.columns"
            ) from error


def sample_factors(behaviour: Behaviour, config: Any) -> list[float]:
    """3 λ / Σ λ of each sample of a step (paper, section 4)."""
    weights = config.loss_weights
    total = sum(weights[kind.name] for kind in behaviour.kinds)
    return [
        3 * weights[kind.name] / total
        for kind in behaviour.kinds
        for _ in range(config.samples_per_step[kind.name])
    ]
