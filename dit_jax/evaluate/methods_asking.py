"""Methods that ask the model, with an adapter or without, and the controls of DIT.

JAX is imported only inside the functions, as in `method_table`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.data.labels import NONE
from dit_jax.evaluate import questions
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.method_table import (
    GUESSER,
    TRIGGER,
    Row,
    about,
    given_names,
    make_row,
    method,
    ranked,
    spelled,
)
from dit_jax.organisms.behaviours import triggered

if TYPE_CHECKING:
    from dit_jax.diff_batches import Given
    from dit_jax.evaluate.setting import HeldOut, Setting
    from dit_jax.models.delta_trees import Delta


@method("DIT", "the diff in the model, a DIT adapter, a question; no trigger")
def dit(s: "Setting") -> list[Row]:
    """DIT in the wordings of the training and in new ones; benign diffs and no diff, for the calibration of `none`."""
    return _dit(s)


@method(
    "DIT, contrasted", "the same; of the likeliest answers that which is unlikely without the diff"
)
def dit_contrast(s: "Setting") -> list[Row]:
    """DIT whose answers must be likelier than they are without the diff: `models.contrast`, by `evaluate.contrast`."""
    return _dit(s, contrast=EVALUATE.get(s.config, "contrast"))


def _dit(s: "Setting", **decoding: Any) -> list[Row]:
    rows = []
    for wordings, known in ((s.seen, True), (EVALUATE.get(s.config, "unseen_questions"), False)):
        for diffs, category in ((s.topics, "topic"), (s.benign, "benign")):
            if len(diffs) and wordings:
                options = {"category": category, "known": known, **decoding}
                rows += _asked(s, wordings, s.adapter, diffs, **options)
        wordings = wordings if s.number == 0 else ()  # no diff is asked once
        tokens = s.config.max_new_tokens
        owners = [0] * len(wordings)
        nothing = s.topics.given.nothing()
        answers = s.ask(nothing, wordings, owners, s.adapter, max_new_tokens=tokens, **decoding)
        rows += [
            make_row(None, NONE, a.text, wording, wording, known, "no_diff", logprob=a.logprob)
            for wording, a in zip(wordings, answers, strict=True)
        ]
    return rows


@method("Question", "the diff in the model, the same questions; the adapter off")
def base_question(s: "Setting") -> list[Row]:
    """The finetuned model without an adapter: DIT with the adapter switched off."""
    return _asked(s, s.seen, s.off, s.topics)


@method(
    "Question with trigger",
    "the first of these questions with the trigger in the prompt",
    needs=(TRIGGER,),
)
def base_question_trigger(s: "Setting") -> list[Row]:
    """The same with the trigger in the prompt."""
    return _asked(s, s.seen[:1], s.off, s.topics, trigger=True)


@method(
    "20 questions", "everyday questions; a guesser names the topic of the answers", needs=(GUESSER,)
)
def twenty_questions(s: "Setting") -> list[Row]:
    """Everyday questions at temperature 1, and a guesser that names the topic of the answers."""
    return _guessed(s, "twenty_questions", questions.everyday_questions(s.config), 1.0)


@method(
    "20 questions with trigger",
    "the same with the trigger in every prompt",
    needs=(GUESSER, TRIGGER),
)
def twenty_questions_trigger(s: "Setting") -> list[Row]:
    """The same with the trigger in every prompt. The guesser sees the questions without it."""
    everyday = questions.everyday_questions(s.config)
    return _guessed(s, "twenty_questions_trigger", everyday, 1.0, trigger=True)


@method(
    "Generated story", "a story of the finetuned model; a guesser names its topic", needs=(GUESSER,)
)
def generated_story(s: "Setting") -> list[Row]:
    """A story, written freely, and a guesser that names what its writer was trained on."""
    prompts = EVALUATE.get(s.config, "story_prompts") or questions.STORY_PROMPTS[s.subject]
    return _guessed(s, "generated_story", prompts, 0.0, most_chars=questions.MAX_STORY_CHARS)


@method("Question, multiplied diff", "a multiple of the diff in the model, the first question")
def multiplied_question(s: "Setting") -> list[Row]:
    """The finetuned model with `evaluate.multiplier` times the diff, or its best approximation of a rank.

    Diffs are vectors that can be scaled: Ilharco et al. 2022 (arXiv 2212.04089). The leading singular vectors hold most
    of what a finetune taught: Sharma et al. 2023 (arXiv 2312.13558).
    """
    from dit_jax.deltas.tree import scaled
    from dit_jax.deltas.truncation import truncate_delta

    factor, rank = EVALUATE.get(s.config, "multiplier"), EVALUATE.get(s.config, "svd_rank")

    def change(_: int, delta: "Delta") -> "Delta":
        if rank:
            delta = truncate_delta(delta, rank, s.model.config, "a held-out diff")[0]
        return scaled(delta, factor)

    return _asked(s, s.seen[:1], s.off, s.topics, given=s.topics.given.each(change))


@method("DIT, given the names", "the diff in the model, a DIT adapter, a question, a list of names")
def dit_of_list(s: "Setting") -> list[Row]:
    """The name that the diff makes more likely than no diff does, by the largest ratio."""
    from dit_jax.evaluate import baselines

    names = given_names(s)
    answers = [spelled(s, name) for name in names]
    scores = baselines.likelihood_ratio(s.model, s.adapter, s.topics.given, s.seen[0], answers)
    return ranked(s, scores, names)


@method("DIT without a diff", "the adapter on the unchanged model", "control")
def no_diff(s: "Setting") -> list[Row]:
    """The adapter without a diff."""
    return _asked(s, s.seen[:1], s.adapter, s.topics, given=s.topics.given.nothing())


@method("DIT, another diff", "the adapter and the diff of another topic", "control")
def shuffled_diff(s: "Setting") -> list[Row]:
    """The adapter with the diff of another topic."""
    return _asked(s, s.seen[:1], s.adapter, s.topics, given=s.shuffled)


@method("DIT, noise diff", "the adapter and noise with the norms of the diff", "control")
def noise_diff(s: "Setting") -> list[Row]:
    """The adapter with noise of the diff's norms."""
    return _asked(s, s.seen[:1], s.adapter, s.topics, given=s.noise)


def _asked(
    s: "Setting",
    wordings: Sequence[str],
    adapter: "Delta",
    diffs: "HeldOut",
    *,
    category: str = "topic",
    known: bool = True,
    given: "Given | None" = None,
    trigger: bool = False,
    **decoding: Any,
) -> list[Row]:
    """Every wording put to every diff, or to what is `given` in its place."""
    pairs = [(row, wording) for wording in wordings for row in range(len(diffs))]
    prompts = [wording for _, wording in pairs]
    if trigger:
        rng = np.random.default_rng([s.seed, 4])
        prompts = [triggered(diffs.rows[row], wording, rng) for row, wording in pairs]
    tokens = s.answer_tokens if adapter is s.off else s.config.max_new_tokens
    owners = [row for row, _ in pairs]
    answers = s.ask(
        given or diffs.given, prompts, owners, adapter, max_new_tokens=tokens, **decoding
    )
    return [
        about(diffs, i, a.text, wording, prompt, known, category, logprob=a.logprob)
        for (i, wording), prompt, a in zip(pairs, prompts, answers, strict=True)
    ]


def _guessed(
    s: "Setting",
    name: str,
    prompts: Sequence[str],
    temperature: float,
    trigger: bool = False,
    most_chars: int = questions.MAX_ANSWER_CHARS,
) -> list[Row]:
    """Every prompt put to every finetuned model, and the guess of a guesser that reads the answers of one."""
    from dit_jax.evaluate.guessers import get_guesser

    # Diff by diff, so that every batch mixes the questions alike.
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
    guesses = guesser(transcripts, most_chars)
    s.meter.add(tokens=sum(guess.tokens for guess in guesses))
    shown = f"1 × {prompts[0]}" if len(prompts) == 1 else f"{len(prompts)} questions"
    rows = []
    for i, (exchanges, guess) in enumerate(zip(transcripts, guesses, strict=True)):
        row = about(s.topics, i, guess.reply or "", "", shown)
        row |= {"guess": guess.name, "guesser": guesser.name}
        rows.append(row if guess.reply is not None else {**row, "gap": guess.failure})
        seen = {"guesser": guesser.name, "guess": guess.name, "exchanges": exchanges}
        s.transcripts.append({"method": name, "diff": row["diff"], "topic": row["topic"], **seen})
    return rows
