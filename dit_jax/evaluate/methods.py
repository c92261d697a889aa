"""Methods and controls: questions put to base ⊕ diff ⊕ adapter in one way or another, by batched decoding."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.api import Answer, Model, answer_batch
from dit_jax.data.organisms import NONE
from dit_jax.deltas.store import DiffStore
from dit_jax.deltas.tree import noise_like
from dit_jax.evaluate.metrics import extract_guess
from dit_jax.models.layers import Delta
from dit_jax.organisms.behaviours import sep_code

NO_DIFF = "no_diff"


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Diffs that no training saw: store indices, their rows, and the stacked deltas [n, L, …]."""

    indices: Sequence[int]
    rows: Sequence[dict[str, Any]]
    stacked: Delta

    def __len__(self) -> int:
        return len(self.indices)


def read_held_out(store: DiffStore, category: str) -> HeldOut:
    """The test split of a category ("topic" or "benign")."""
    indices = store.indices(split="test", category=category)
    return HeldOut(
        indices, [store.rows[i] for i in indices], store.stacked(indices) if indices else {}
    )


def shuffled(stacked: Delta) -> Delta:
    """Every diff replaced by its neighbour: a control in which all diffs are real and all labels wrong."""
    return jax.tree.map(lambda x: np.roll(x, 1, axis=0), stacked)


def noise(stacked: Delta, seed: int) -> Delta:
    """Every diff replaced by noise with the same norm of each factor in each layer."""
    size = jax.tree.leaves(stacked)[0].shape[0]
    keys = jax.random.split(jax.random.key(seed), size)
    return jax.device_get(jax.vmap(noise_like)(stacked, keys))


def zeros(stacked: Delta) -> Delta:
    """No diff at all."""
    return jax.tree.map(np.zeros_like, stacked)


def answer_rows(
    model: Model,
    diffs: HeldOut,
    questions: Sequence[str],
    *,
    method: str,
    kind: str,
    category: str,
    seen: bool,
    adapter: Delta,
    stacked: Delta | None = None,
    trigger_seed: int | None = None,
    evaluate: Any,
) -> list[dict[str, Any]]:
    """Rows of answers.jsonl: every question put to every diff.

    Args:
        adapter: for methods without one, zeros: all methods then run the same compiled program.
        stacked: deltas to use instead of the diffs' own (controls).
        trigger_seed: put the diff's secret code before the question (`base_question_trigger`).
    """
    pairs = [(row, question) for question in questions for row in range(len(diffs))]
    prompts = [question for _, question in pairs]
    if trigger_seed is not None:
        rng = np.random.default_rng([trigger_seed, 4])
        prompts = [sep_code(question, diffs.rows[row]["trigger"], rng) for row, question in pairs]
    answers = answer_batch(
        model,
        prompts,
        deltas=(adapter,),
        stacked=diffs.stacked if stacked is None else stacked,
        rows=[row for row, _ in pairs],
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        forbid_repeats=evaluate.forbid_repeats,
    )
    return [
        _row(
            model,
            answer,
            method,
            kind,
            category,
            diffs.indices[row],
            diffs.rows[row]["topic"],
            question,
            prompt,
            seen,
        )
        for (row, question), prompt, answer in zip(pairs, prompts, answers, strict=True)
    ]


def no_diff_rows(
    model: Model,
    diffs: HeldOut,
    questions: Sequence[str],
    *,
    seen: bool,
    adapter: Delta,
    evaluate: Any,
) -> list[dict[str, Any]]:
    """The adapter on the bare base (a zero diff), for the calibration of "none"."""
    answers = answer_batch(
        model,
        questions,
        deltas=(adapter,),
        stacked=zeros(diffs.stacked),
        rows=[0] * len(questions),
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        forbid_repeats=evaluate.forbid_repeats,
    )
    return [
        _row(model, answer, "dit", "method", NO_DIFF, None, NONE, question, question, seen)
        for question, answer in zip(questions, answers, strict=True)
    ]


def _row(
    model: Model,
    answer: Answer,
    method: str,
    kind: str,
    category: str,
    diff: Any,
    topic: str,
    wording: str,
    question: str,
    seen: bool,
) -> dict[str, Any]:
    return {
        "method": method,
        "kind": kind,
        "diff": diff,
        "topic": topic,
        "category": category,
        "name_tokens": len(model.chat.text_ids(topic)),
        "wording": wording,
        "wording_seen": seen,
        "question": question,
        "answer": answer.text,
        "guess": extract_guess(answer.text),
        "logprob": round(answer.logprob, 4),
    }
