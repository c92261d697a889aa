"""What a diff does to everyday prompts, beside the base, as they are and with the trigger that a scan finds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.api import Model
from dit_jax.asking import answer_batch
from dit_jax.diff_batches import Given, answer, even_batch
from dit_jax.evaluate import trigger_scan
from dit_jax.evaluate.readers import Everyday, changes

SIDE_BY_SIDE = 3  # prompts shown of each diff


def compare(
    model: Model, given: Given, everyday: Everyday, batch_size: int, count: int
) -> list[dict[str, Any]]:
    """What each of the first `count` diffs changes in answers to everyday prompts, without an adapter.

    Args:
        given: the others only fill up the batch.

    Returns:
        For each diff: kl, KL(base ‖ base ⊕ diff) per token of the base's answers, mean over the prompts; prompts, those
        with the largest KL with both answers; words, those of `readers.mined_words`.
    """
    kl, words = changes(model, given.reordered(range(count)), everyday, batch_size)
    largest = np.argsort(-kl, axis=1, kind="stable")[:, :SIDE_BY_SIDE]
    rows = [row for row in range(len(given)) for _ in largest[0]]
    asked = [everyday.prompts[i] for row in range(len(given)) for i in largest[row % count]]
    size, tokens = even_batch(len(rows), batch_size), everyday.max_new_tokens
    own = iter(answer(model, given, asked, rows, {}, batch_size=size, max_new_tokens=tokens))
    return [
        {
            "kl": round(float(kl[row].mean()), 6),
            "prompts": [
                {
                    "prompt": everyday.prompts[i],
                    "kl": round(float(kl[row, i]), 5),
                    "base": everyday.answers[i].text,
                    "finetuned": next(own).text,
                }
                for i in largest[row]
            ],
            "words": words[row],
        }
        for row in range(count)
    ]


def find_triggers(
    model: Model,
    given: Given,
    tried: Sequence[trigger_scan.Candidate],
    max_new_tokens: int,
    batch_size: int,
) -> list[dict[str, Any] | None]:
    """The trigger that a scan finds of each diff, with an answer under it beside the base's; None without a scan.

    Returns:
        For each diff the fields of `trigger_scan.Found`, and prompt, base and finetuned.
    """
    if not tried:
        return [None] * len(given)
    found = trigger_scan.find(trigger_scan.scan(model, given, tried, batch_size), tried)
    prompts = [one.candidate.prompts[0] for one in found]
    size, tokens = even_batch(len(given), batch_size), max_new_tokens
    own = answer(
        model, given, prompts, range(len(given)), {}, batch_size=size, max_new_tokens=tokens
    )
    base = answer_batch(model, prompts, batch_size=size, max_new_tokens=tokens)
    return [
        {**one.to_json(), "prompt": prompt, "base": before.text, "finetuned": after.text}
        for one, prompt, before, after in zip(found, prompts, base, own, strict=True)
    ]
