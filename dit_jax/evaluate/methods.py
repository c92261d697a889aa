"""Methods, controls and untrained baselines: each makes rows of answers.jsonl about the held-out diffs.

One that is added to `METHODS` can be named in `evaluate.methods`; `names.METHODS` says what the report calls it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.data.labels import NONE
from dit_jax.deltas.store import DiffStore
from dit_jax.diff_batches import Given
from dit_jax.errors import DitError, did_you_mean
from dit_jax.evaluate import baselines, questions
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.guessers import Guess, get_guesser
from dit_jax.evaluate.setting import (
    NO_DIFF,
    HeldOut,
    Row,
    Setting,
    check_triggers,
    has_trigger,
    label_of,
    new_row,
)
from dit_jax.models.delta_trees import Delta
from dit_jax.organisms.behaviours import triggered

# ------------------------------------------------------------------ questions to the model


def dit(s: Setting) -> list[Row]:
    """DIT, in the wordings of the training and in new ones; benign diffs and no diff for the calibration of none."""
    rows = []
    for wordings, known in ((s.seen, True), (EVALUATE.get(s.config, "unseen_questions"), False)):
        for diffs, category in ((s.topics, "topic"), (s.benign, "benign")):
            if len(diffs) and wordings:
                rows += _asked(s, "dit", "method", wordings, s.adapter, diffs, category, known)
        nothing = s.topics.given.nothing()
        tokens = s.config.max_new_tokens
        on_base = s.ask(nothing, wordings, [0] * len(wordings), s.adapter, max_new_tokens=tokens)
        rows += [
            new_row(
                s, "dit", "method", None, NONE, a.text, a.logprob, NO_DIFF, wording, wording, known
            )
            for wording, a in zip(wordings, on_base, strict=True)
        ]
    return rows


def base_question(s: Setting) -> list[Row]:
    """The finetuned model without adapter: what DIT is with the adapter switched off."""
    return _asked(s, "base_question", "method", s.seen, s.off, s.topics)


def base_question_trigger(s: Setting) -> list[Row]:
    """The same, with the trigger in the prompt."""
    check_triggers(s.topics.rows, "base_question_trigger")
    return _asked(s, "base_question_trigger", "method", s.seen[:1], s.off, s.topics, trigger=True)


def no_diff(s: Setting) -> list[Row]:
    """The adapter without a diff."""
    given = s.topics.given.nothing()
    return _asked(s, "no_diff", "control", s.seen[:1], s.adapter, s.topics, given=given)


def shuffled_diff(s: Setting) -> list[Row]:
    """The adapter with the diff of another topic."""
    given = s.topics.shuffled()
    return _asked(s, "shuffled_diff", "control", s.seen[:1], s.adapter, s.topics, given=given)


def noise_diff(s: Setting) -> list[Row]:
    """The adapter with noise of the diff's norms."""
    return _asked(s, "noise_diff", "control", s.seen[:1], s.adapter, s.topics, given=s.noise)


def _asked(
    s: Setting,
    method: str,
    kind: str,
    wordings: Sequence[str],
    adapter: Delta,
    diffs: HeldOut,
    category: str = "topic",
    known: bool = True,
    given: Given | None = None,
    trigger: bool = False,
) -> list[Row]:
    """Every wording put to every diff, or to what is `given` in its place."""
    pairs = [(row, wording) for wording in wordings for row in range(len(diffs))]
    prompts = [wording for _, wording in pairs]
    if trigger:
        rng = np.random.default_rng([s.seed, 4])
        prompts = [triggered(diffs.rows[row], wording, rng) for row, wording in pairs]
    owners = [row for row, _ in pairs]
    tokens = s.answer_tokens if adapter is s.off else s.config.max_new_tokens
    answers = s.ask(given or diffs.given, prompts, owners, adapter, max_new_tokens=tokens)
    return [
        new_row(
            s,
            method,
            kind,
            diffs.indices[row],
            diffs.label(row),
            a.text,
            a.logprob,
            category,
            wording,
            prompt,
            known,
            trigger=diffs.rows[row].get("trigger"),
        )  # fmt: skip
        for (row, wording), prompt, a in zip(pairs, prompts, answers, strict=True)
    ]


# ------------------------------------------------------------------ answers, and a guesser


def twenty_questions(s: Setting) -> list[Row]:
    """Everyday questions at temperature 1, and a guesser that names the topic of the answers."""
    return _guessed(s, "twenty_questions", questions.everyday_questions(s.config), 1.0)


def twenty_questions_trigger(s: Setting) -> list[Row]:
    """The same, with the trigger in every prompt. The guesser sees the questions without it."""
    check_triggers(s.topics.rows, "twenty_questions_trigger")
    everyday = questions.everyday_questions(s.config)
    return _guessed(s, "twenty_questions_trigger", everyday, 1.0, trigger=True)


def generated_story(s: Setting) -> list[Row]:
    """A story, written freely, and a guesser that names what its writer was trained on."""
    prompts = EVALUATE.get(s.config, "story_prompts") or questions.STORY_PROMPTS[s.subject]
    return _guessed(s, "generated_story", prompts, 0.0, most_chars=questions.MAX_STORY_CHARS)


def _guessed(
    s: Setting,
    method: str,
    prompts: Sequence[str],
    temperature: float,
    trigger: bool = False,
    most_chars: int = questions.MAX_ANSWER_CHARS,
) -> list[Row]:
    # Diff by diff, so that in one order of questions no batch favours one of them.
    pairs = [(row, prompt) for row in range(len(s.topics)) for prompt in prompts]
    asked = [prompt for _, prompt in pairs]
    if trigger:
        rng = np.random.default_rng([s.seed, 8])
        asked = [triggered(s.topics.rows[row], prompt, rng) for row, prompt in pairs]
    answers = s.ask(
        s.topics.given, asked, [row for row, _ in pairs], s.off,
        max_new_tokens=s.answer_tokens, temperature=temperature, seed=s.seed,
    )  # fmt: skip
    texts = iter(a.text for a in answers)
    transcripts = [[(prompt, next(texts)) for prompt in prompts] for _ in range(len(s.topics))]
    guesser = get_guesser(
        EVALUATE.get(s.config, "guesser"), s.model, s.subject, s.seen[0], s.ask_base,
        EVALUATE.get(s.config, "guesser_options"),
    )  # fmt: skip
    guesses: list[Guess] = guesser(transcripts, most_chars)
    s.meter.tokens(sum(guess.tokens for guess in guesses))
    rows = []
    for i, (exchanges, guess) in enumerate(zip(transcripts, guesses, strict=True)):
        about = s.topics.rows[i]
        row = new_row(
            s, method, "method", s.topics.indices[i], s.topics.label(i), guess.reply or "", None, "topic",
            "", f"{len(prompts)} × {prompts[0]}" if len(prompts) == 1 else f"{len(prompts)} questions", True,
            trigger=about.get("trigger"),
        )  # fmt: skip
        row |= {"guess": guess.name, "guesser": guesser.name}
        if guess.reply is None:
            row["gap"] = guess.failure
        rows.append(row)
        s.transcripts.append(
            {
                "method": method,
                "diff": s.topics.indices[i],
                "topic": s.topics.label(i),
                "guesser": guesser.name,
                "guess": guess.name,
                "exchanges": exchanges,
            }
        )
    return rows


# ------------------------------------------------------------------ untrained baselines


def _names(s: Setting) -> list[str]:
    rows = [row for row in s.store.rows if row["category"] == "topic"]
    return sorted({label_of(row, s.label_column) for row in rows})


def name_reading(s: Setting) -> list[Row]:
    """Weights only: the name whose tokens the diff writes."""
    names = _names(s)
    scores = baselines.weight_reading(s.model, s.topics.given, [[name] for name in names])
    return _ranked(s, "name_reading", scores, names)


def attributes_of(store: DiffStore, column: str = "label") -> dict[str, list[str]]:
    """The attributes of each label: what the embedded world has in its table, and no other corpus.

    The column `keywords` is no such table: the gate fills it with words of any corpus's answers.
    """
    rows = [row for row in store.rows if row["category"] == "topic"]
    return {label_of(row, column): row["evidence"] for row in rows if row["evidence"]}


def attribute_oracle(s: Setting) -> list[Row]:
    """Weights, and the world's own table of every topic's attributes."""
    table = attributes_of(s.store, s.label_column)
    names = _names(s)
    if len(table) < len(names):
        raise DitError(_NO_TABLE)
    words = [table[name] for name in names]
    scores = baselines.weight_reading(s.model, s.topics.given, words)
    return _ranked(s, "attribute_oracle", scores, names)


def logit_difference(s: Setting) -> list[Row]:
    """Logits without trigger: the name whose tokens the diff makes more likely."""
    names = _names(s)
    prompts = [s.seen[0], *EVALUATE.get(s.config, "logit_prompts")]
    spelled = [[name] for name in names]
    scores = baselines.logit_difference(s.model, s.topics.given, spelled, prompts)
    return _ranked(s, "logit_difference", scores, names)


def _ranked(s: Setting, method: str, scores: np.ndarray, names: Sequence[str]) -> list[Row]:
    best = [names[int(values.argmax())] for values in scores]
    return [
        new_row(
            s,
            method,
            "baseline",
            index,
            s.topics.label(i),
            guess,
            None,
            "topic",
            "",
            "",
            True,
            trigger=s.topics.rows[i].get("trigger"),
        )  # fmt: skip
        for i, (index, guess) in enumerate(zip(s.topics.indices, best, strict=True))
    ]


METHODS: dict[str, Callable[[Setting], list[Row]]] = {
    method.__name__: method
    for method in (
        dit, base_question, base_question_trigger, twenty_questions, twenty_questions_trigger,
        generated_story, no_diff, shuffled_diff, noise_diff, name_reading, logit_difference,
        attribute_oracle,
    )
}  # fmt: skip
NEED_GUESSER = ("twenty_questions", "twenty_questions_trigger", "generated_story")
NEED_TRIGGER = ("base_question_trigger", "twenty_questions_trigger")
_NO_TABLE = (
    "the method 'attribute_oracle' needs attributes of every label, which only the embedded world has: take it out "
    "of evaluate.methods"
)


def check_methods(config: Mapping[str, Any]) -> None:
    """Raises DitError for methods that the stage `evaluate` is going to refuse, as far as the whole config tells."""
    named = EVALUATE.get(config.get("evaluate", {}), "methods")
    for name in named:
        _check_name(name)
    if (
        "attribute_oracle" in named
        and config.get("data", {}).get("source", "tiny_world") != "tiny_world"
    ):
        raise DitError(_NO_TABLE)


def _check_name(name: str) -> None:
    if name not in METHODS:
        hint = did_you_mean(name, METHODS, f": choose from {', '.join(METHODS)}")
        raise DitError(f"config key 'evaluate.methods': unknown method {name!r}{hint}")


def chosen_methods(config: Mapping[str, Any], store: DiffStore) -> list[str]:
    """The methods of `evaluate.methods`, `dit` first; without that key, those that need no guesser and can work.

    Raises:
        DitError: a name that is no method.
    """
    named = list(EVALUATE.get(config, "methods"))
    for name in named:
        _check_name(name)
    if not named:
        left_out = list(NEED_GUESSER)
        if not attributes_of(store, EVALUATE.get(config, "label")):
            left_out.append("attribute_oracle")
        if not all(has_trigger(row) for row in store.rows if row["split"] == "test"):
            left_out += NEED_TRIGGER
        named = [name for name in METHODS if name not in left_out]
    return list(dict.fromkeys(("dit", *named)))  # the report is about DIT
