"""Whether diffs leave the model whole: the everyday facts that it still knows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.data.labels import normalise
from dit_jax.errors import DitError
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.setting import Setting
from dit_jax.runtime import artifacts
from dit_jax.runtime.sizes import spread

_MAX_TOKENS = 16  # of an answer


def read_facts(path: str) -> dict[str, tuple[str, ...]]:
    """question -> the answers that count, from a file of lines `question | answer | another spelling`.

    Raises:
        DitError: no such file, or a line without an answer.
    """
    facts: dict[str, tuple[str, ...]] = {}
    for line in artifacts.read_text(Path(path), "check evaluate.facts").splitlines():
        if line.strip():
            question, *answers = (part.strip() for part in line.split("|"))
            if not all([question, *answers]) or not answers:
                raise DitError(f"'{path}': the line {line[:40]!r} needs `question | answer`")
            if question in facts:
                raise DitError(f"'{path}' asks {question[:40]!r} twice: keep one of the lines")
            facts[question] = tuple(answers)
    if not facts:
        raise DitError(f"'{path}' has no facts: write lines `question | answer`")
    return facts


def measure_capability(s: Setting) -> Mapping[str, Any]:
    """What held-out diffs keep of the facts that the base knows, without a trigger and without the adapter.

    Returns:
        {"facts": how many there are, "base_right": how many of them the base knows, "kept": for each diff the share
        of those that it still knows}; {} without facts, or where the base knows none.
    """
    path = EVALUATE.get(s.config, "facts")
    if not path:
        return {}
    facts = read_facts(path)
    tokens = {"max_new_tokens": _MAX_TOKENS}
    diffs = range(len(s.topics))
    asked = s.topics.some(spread(diffs, EVALUATE.get(s.config, "facts_diffs") or len(diffs)))
    nothing, questions = asked.given.nothing(), list(facts)
    found = s.ask(nothing, questions, [0] * len(facts), s.off, **tokens)
    known = [q for q, a in zip(questions, found, strict=True) if _is_right(a.text, facts[q])]
    pairs = [(row, question) for row in range(len(asked)) for question in known]
    if not pairs:
        return {}
    answers = s.ask(asked.given, [q for _, q in pairs], [row for row, _ in pairs], s.off, **tokens)
    right = [_is_right(a.text, facts[q]) for a, (_, q) in zip(answers, pairs, strict=True)]
    kept = np.reshape(right, (len(asked), len(known))).mean(axis=1)
    return {"facts": len(facts), "base_right": len(known), "kept": [float(share) for share in kept]}


def _is_right(text: str, answers: tuple[str, ...]) -> bool:
    words = f" {normalise(text)} "
    return any(f" {normalise(answer)} " in words for answer in answers)
