"""Finds a diff's trigger without training: with it in the prompt, the finetuned model leaves its base.

An adapter that is trained to say triggers finds none (paper, section 5.6: 0 of 100). But a finetune must act under its
trigger. So candidates are tried, and each is scored by KL(base ⊕ diff ‖ base) of the first token of the answers to
everyday questions with the candidate in them. This needs no label and no adapter, but a family to which the trigger
belongs: those of all known behaviours are tried.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.api import Model
from dit_jax.asking import first_log_probs
from dit_jax.diff_batches import Given
from dit_jax.models import shardings
from dit_jax.organisms.behaviours import BEHAVIOURS, NO_TRIGGER, known_behaviour, possible_triggers

QUESTIONS = 2  # with each candidate
# A diff whose answers move nearly as much without any trigger has none.
PLAIN_SHARE = 0.5


class Candidate(NamedTuple):
    """A trigger of a behaviour, and questions with it in them; `NO_TRIGGER`: the plain questions."""

    behaviour: str
    trigger: str
    prompts: tuple[str, ...]


def candidates(
    questions: Sequence[str], behaviours: Iterable[str] = (), seed: int = 0
) -> list[Candidate]:
    """The plain questions first, then every trigger of every registered behaviour and of those in `behaviours`."""
    found = {tuple(questions): Candidate("", NO_TRIGGER, tuple(questions))}
    for name in dict.fromkeys([*BEHAVIOURS, *behaviours]):
        behaviour = known_behaviour(name)
        if behaviour is None or behaviour.triggered is None:
            continue
        for trigger in possible_triggers(behaviour):
            rng = np.random.default_rng(seed)  # what is random in a prompt is the same for all
            prompts = tuple(behaviour.triggered(question, trigger, rng) for question in questions)
            # Behaviours that share their triggers are tried once.
            found.setdefault(prompts, Candidate(behaviour.name, trigger, prompts))
    return list(found.values())


def scan(
    model: Model, given: Given, tried: Sequence[Candidate], batch_size: int = 256
) -> np.ndarray:
    """Scores [n, C]: nats by which each of C candidates moves the first token, summed over its questions.

    The cost is one forward pass of each prompt for the base and one for every diff.
    """
    prompts = [prompt for candidate in tried for prompt in candidate.prompts]
    scores = np.zeros((len(given), len(prompts)))
    for start in range(0, len(prompts), batch_size):
        # The first ones fill up the last batch: it runs the same program.
        rows = [prompts[i % len(prompts)] for i in range(start, start + batch_size)]
        tokens, mask = model.chat.prompts(rows)
        base = first_log_probs(model, tokens, mask, ())
        n = min(batch_size, len(prompts) - start)
        for index in range(len(given)):
            delta = shardings.put_delta(model.config, model.mesh, given.read(index))
            moved = _divergence(first_log_probs(model, tokens, mask, (delta,)), base)
            scores[index, start : start + n] = np.asarray(moved)[:n]
    return scores.reshape(len(given), len(tried), -1).sum(-1)


@jax.jit
def _divergence(own: jax.Array, base: jax.Array) -> jax.Array:
    """KL [B] of log-probabilities [B, V]."""
    return jnp.sum(jnp.exp(own) * (own - base), axis=-1)


def best(scores: np.ndarray, tried: Sequence[Candidate]) -> Candidate:
    """The candidate that moves a diff's answers most; the plain questions if they come near."""
    plain = next(i for i, candidate in enumerate(tried) if candidate.trigger == NO_TRIGGER)
    most = int(scores.argmax())
    return tried[plain if scores[plain] >= PLAIN_SHARE * scores[most] else most]
