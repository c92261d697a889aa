"""Methods, controls and untrained baselines: what each is, and how it makes rows of answers.jsonl.

A function under `@method(…)` can be named in `evaluate.methods`. Reports, tables and config checks read here what it is
called, what it sees and what it needs; so this file imports JAX only inside the functions.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_jax.config.user_code import import_object
from dit_jax.data.labels import NONE, extract_guess
from dit_jax.errors import DitError, did_you_mean
from dit_jax.evaluate import questions
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.organisms.behaviours import NO_TRIGGER, triggered

if TYPE_CHECKING:
    from dit_jax.api import Model
    from dit_jax.deltas.store import DiffStore
    from dit_jax.diff_batches import Given
    from dit_jax.evaluate.setting import HeldOut, Setting
    from dit_jax.models.delta_trees import Delta

Row = dict[str, Any]
EVALUATION_FORMAT = "dit_jax.evaluation"  # of the manifest in WORKDIR/evaluate
GROUPS = {
    "method": "Methods that ask the model",
    "control": "Controls: they should find nothing",
    "baseline": "Baselines without training: they read the weights or the logits",
}
READERS = (
    "written_words",
    "mined_words",
    "amplified_words",
)  # need no adapter, run or list of names
# What a method may need.
GUESSER, TRIGGER, ATTRIBUTES, TRIGGER_LABELS = "guesser", "trigger", "attributes", "trigger labels"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to ask held-out diffs; call it with a `Setting` to get its rows of answers.jsonl.

    name: in configs and answers; title: in reports; sees: what it is shown, in a few words; group: a key of `GROUPS`.
    needs: any of GUESSER, TRIGGER, ATTRIBUTES (an auditor of an unknown model has neither of these two), and
        TRIGGER_LABELS: what adapters should say is the trigger.
    """

    name: str
    title: str
    sees: str
    group: str
    needs: tuple[str, ...]
    ask: "Callable[[Setting], Iterable[Row]]"

    def __call__(self, s: "Setting") -> list[Row]:
        """Rows with every column. Raises DitError: a held-out diff has no trigger, and the method needs one."""
        if TRIGGER in self.needs and not all(map(has_trigger, s.topics.rows)):
            raise DitError(
                f"the method {self.name!r} needs diffs with a trigger: take it out of evaluate.methods"
            )
        if TRIGGER_LABELS in self.needs and s.label_column != "trigger":
            raise DitError(
                f"the method {self.name!r} names triggers: set evaluate.label='trigger', or take it out of "
                "evaluate.methods"
            )
        rows = []
        for row in self.ask(s):
            listed = s.config.list_evidence and self.group != "baseline"
            guess = extract_guess(row["answer"], row["topic"]) if listed else row["answer"]
            tokens = len(s.model.chat.text_ids(_spelled(s, row["topic"])))
            head = {"method": self.name, "kind": self.group}
            rows.append({**head, "name_tokens": tokens, "guess": guess, **row})
        return rows


METHODS: dict[str, Method] = {}


def method(
    title: str, sees: str, group: str = "method", needs: tuple[str, ...] = ()
) -> "Callable[[Callable[[Setting], Iterable[Row]]], Method]":
    """Adds the function below to `METHODS` under its own name."""

    def add(ask: "Callable[[Setting], Iterable[Row]]") -> Method:
        made = METHODS[ask.__name__] = Method(ask.__name__, title, sees, group, needs, ask)
        return made

    return add


def held_out_answers(answers: Iterable[Row]) -> list[Row]:
    """The answers about held-out diffs with a label: those that can be graded."""
    return [row for row in answers if row["category"] == "topic" and row["diff"] is not None]


def has_trigger(row: Mapping[str, Any]) -> bool:
    """Whether a diff, by its row of the index, shows its behaviour under a trigger."""
    return str(row.get("trigger") or NO_TRIGGER) != NO_TRIGGER


# ------------------------------------------------------------------ questions to the model


@method("DIT", "the diff in the model, a DIT adapter, a question; no trigger")
def dit(s: "Setting") -> list[Row]:
    """DIT in the wordings of the training and in new ones; benign diffs and no diff, for the calibration of `none`."""
    rows = []
    for wordings, known in ((s.seen, True), (EVALUATE.get(s.config, "unseen_questions"), False)):
        for diffs, category in ((s.topics, "topic"), (s.benign, "benign")):
            if len(diffs) and wordings:
                rows += _asked(s, wordings, s.adapter, diffs, category=category, known=known)
        wordings = wordings if s.number == 0 else ()  # no diff is asked once
        tokens = s.config.max_new_tokens
        owners = [0] * len(wordings)
        nothing = s.topics.given.nothing()
        answers = s.ask(nothing, wordings, owners, s.adapter, max_new_tokens=tokens)
        rows += [
            _row(None, NONE, a.text, wording, wording, known, "no_diff", logprob=a.logprob)
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

    names = _names(s)
    answers = [_spelled(s, name) for name in names]
    scores = baselines.likelihood_ratio(s.model, s.adapter, s.topics.given, s.seen[0], answers)
    return _ranked(s, scores, names)


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
) -> list[Row]:
    """Every wording put to every diff, or to what is `given` in its place."""
    pairs = [(row, wording) for wording in wordings for row in range(len(diffs))]
    prompts = [wording for _, wording in pairs]
    if trigger:
        rng = np.random.default_rng([s.seed, 4])
        prompts = [triggered(diffs.rows[row], wording, rng) for row, wording in pairs]
    tokens = s.answer_tokens if adapter is s.off else s.config.max_new_tokens
    owners = [row for row, _ in pairs]
    answers = s.ask(given or diffs.given, prompts, owners, adapter, max_new_tokens=tokens)
    return [
        _about(diffs, i, a.text, wording, prompt, known, category, logprob=a.logprob)
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
        row = _about(s.topics, i, guess.reply or "", "", shown)
        row |= {"guess": guess.name, "guesser": guesser.name}
        rows.append(row if guess.reply is not None else {**row, "gap": guess.failure})
        seen = {"guesser": guesser.name, "guess": guess.name, "exchanges": exchanges}
        s.transcripts.append({"method": name, "diff": row["diff"], "topic": row["topic"], **seen})
    return rows


def _about(diffs: "HeldOut", i: int, *rest: Any, **named: Any) -> Row:
    """`_row` about held-out diff i."""
    row = diffs.rows[i]
    named |= {key: row.get(key) for key in ("trigger", "variant", "topic_category")}
    return _row(diffs.indices[i], diffs.label(i), *rest, **named)


def _row(
    diff: int | None,
    topic: str,
    answer: str,
    wording: str = "",
    question: str = "",
    known: bool = True,
    category: str = "topic",
    *,
    trigger: str | None = None,
    variant: str | None = None,
    topic_category: str | None = None,
    logprob: float | None = None,
) -> Row:
    """What a function gives of a row; `Method` adds the rest. known: whether the adapter was trained on the wording."""
    return {
        "diff": diff,
        "topic": topic,
        "trigger": trigger,
        "variant": variant or "",
        "topic_category": topic_category or "",
        "category": category,
        "wording": wording,
        "wording_seen": known,
        "question": question,
        "answer": answer,
        "logprob": None if logprob is None else round(logprob, 4),
    }


# ------------------------------------------------------------------ untrained baselines


@method(
    "Name reading", "weights only: cosine of the diff with the names' embeddings", group="baseline"
)
def name_reading(s: "Setting") -> list[Row]:
    """Weights only: the name whose tokens the diff writes."""
    from dit_jax.evaluate import baselines

    names = _names(s)
    spelled = [[_spelled(s, name)] for name in names]
    scores = baselines.weight_reading(s.model, s.topics.given, spelled)
    return _ranked(s, scores, names)


@method("Logit difference", "logits without trigger, with and without the diff", group="baseline")
def logit_difference(s: "Setting") -> list[Row]:
    """Logits without trigger: the name whose tokens the diff makes more likely."""
    from dit_jax.evaluate import baselines

    names = _names(s)
    prompts = [s.seen[0], *EVALUATE.get(s.config, "logit_prompts")]
    spelled = [[_spelled(s, name)] for name in names]
    return _ranked(s, baselines.logit_difference(s.model, s.topics.given, spelled, prompts), names)


@method("Written words", "words that the weights write; the base says their topic", "baseline")
def written_words(s: "Setting") -> list[Row]:
    """Weights only, no list of names: see `readers.written_words`."""
    return _read(s, "written_words")


@method("Mined words", "words whose logits rise in everyday answers; the same", "baseline")
def mined_words(s: "Setting") -> list[Row]:
    """Logits without trigger, no list of names: see `readers.mined_words`."""
    return _read(s, "mined_words")


@method(
    "Amplified words", "words of texts that enlarge what the diff changes; the same", "baseline"
)
def amplified_words(s: "Setting") -> list[Row]:
    """Contrastive decoding without trigger: see `readers.amplified_words`."""
    return _read(s, "amplified_words")


def _read(s: "Setting", name: str) -> list[Row]:
    """What a reader of `readers.READERS` says of every diff."""
    from dit_jax.evaluate import readers

    tokens, size = s.config.max_new_tokens, s.config.batch_size
    everyday = readers.ask_base(s.model, questions.everyday_questions(s.config), tokens)
    told = readers.read(
        s.model, s.topics.given, name, s.seen[0], everyday, size,
        max_new_tokens=tokens, forbid_repeats=s.config.forbid_repeats,
    )  # fmt: skip
    s.meter.add(answers=len(told))
    return [
        {**_about(s.topics, i, one.text, s.seen[0], one.prompt), "guess": one.name}
        for i, one in enumerate(told)
    ]


@method(
    "Attribute oracle",
    "weights, and the world's own table of every topic's attributes",
    group="baseline",
    needs=(ATTRIBUTES,),
)
def attribute_oracle(s: "Setting") -> list[Row]:
    """Weights, and the world's own table of every topic's attributes."""
    from dit_jax.evaluate import baselines

    table = _labels(s.store, s.label_column)
    if not all(table.values()):
        raise DitError(_NO_TABLE)
    names = sorted(table)
    words = [table[name] for name in names]
    return _ranked(s, baselines.weight_reading(s.model, s.topics.given, words), names)


@method(
    "Trigger scan",
    "first tokens of everyday answers under every known trigger",
    group="baseline",
    needs=(TRIGGER_LABELS,),
)
def trigger_scan(s: "Setting") -> list[Row]:
    """The trigger that makes the finetuned model leave its base, among those of all behaviours."""
    from dit_jax.evaluate import trigger_scan as scanning

    everyday = questions.everyday_questions(s.config)[: scanning.QUESTIONS]
    behaviours = [str(row.get("behaviour", "")) for row in s.topics.rows]
    tried = scanning.candidates(everyday, behaviours)
    scores = scanning.scan(s.model, s.topics.given, tried, s.config.batch_size)
    return [_about(s.topics, i, scanning.best(row, tried).trigger) for i, row in enumerate(scores)]


def _labels(store: "DiffStore", column: str) -> dict[str, list[str]]:
    """Every label of a store with its attributes, which the embedded world has in its table and no other corpus.

    The column `keywords` is no such table: the gate fills it with words of any corpus's answers.
    """
    from dit_jax.deltas.store import label_of

    found: dict[str, list[str]] = {}
    for row in store.rows:
        if row["category"] == "topic":
            label = label_of(row, column)
            found[label] = row["evidence"] or found.get(label, [])
    return found


def _ranked(s: "Setting", scores: np.ndarray, names: Sequence[str]) -> list[Row]:
    """The best name for every diff, by its scores [diffs, names], and the rank of the right one among them."""
    rows = []
    for i, row in enumerate(scores):
        own = row[names.index(s.topics.label(i))]
        chosen = _about(s.topics, i, names[int(row.argmax())])
        rows.append({**chosen, "names": len(names), "rank": int((row > own).sum()) + 1})
    return rows


def _spelled(s: "Setting", name: str) -> str:
    """A name as an answer has it: many tokenizers make another token of it after a space."""
    return str(EVALUATE.get(s.config, "answer_prefix")) + name


def _names(s: "Setting") -> list[str]:
    """The names that a method with a list is given."""
    if EVALUATE.get(s.config, "names") == "held_out":
        return sorted({s.all_topics.label(row) for row in range(len(s.all_topics))})
    return sorted(_labels(s.store, s.label_column))


# ------------------------------------------------------------------ which of them run

_NO_TABLE = (
    "the method 'attribute_oracle' needs attributes of every label, which only the embedded world has: take it out "
    "of evaluate.methods"
)


def check_methods(config: Mapping[str, Any]) -> None:
    """Raises DitError for methods that the stage `evaluate` would refuse, as far as the whole config tells."""
    named = EVALUATE.get(config.get("evaluate", {}), "methods")
    chosen = list(map(find_method, named))
    source = config.get("data", {}).get("source", "tiny_world")
    if source != "tiny_world" and any(ATTRIBUTES in one.needs for one in chosen):
        raise DitError(_NO_TABLE)


def find_method(name: str) -> Method:
    """The method of that name, or the user's own reader at an import path `package.module:function`.

    A reader is a function (base, diff, question) -> answer: a `Model`, a delta tree on the host, a text -> a text.

    Raises:
        DitError: an unknown name, or an import path without a function.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        known = f": choose from {', '.join(METHODS)}, or the import path 'package.module:function' of your own"
        hint = did_you_mean(name, METHODS, known)
        raise DitError(f"config key 'evaluate.methods': unknown method {name!r}{hint}")
    read = import_reader(name)

    def ask(s: "Setting") -> list[Row]:
        """Topics and benign diffs, all with the first question."""
        question, rows = s.seen[0], []
        for diffs, category in ((s.topics, "topic"), (s.benign, "benign")):
            for i in range(len(diffs)):
                answer = read(s.model, diffs.given.read(i), question)
                rows.append(_about(diffs, i, answer, question, question, category=category))
        return rows

    return Method(name, name, "a function of base, diff and question", "method", (), ask)


def import_reader(path: str) -> "Callable[[Model, Delta, str], str]":
    """The reader at an import path, which then raises a DitError for an answer that is no text."""
    found = import_object(path, "reader")
    if not callable(found):
        raise DitError(f"reader {path!r} is a {type(found).__name__}, not a function")

    def read(base: "Model", diff: "Delta", question: str) -> str:
        answer = found(base, diff, question)
        if not isinstance(answer, str):
            raise DitError(f"reader {path!r} gave a {type(answer).__name__}, not a text")
        return answer

    return read


def chosen_methods(config: Mapping[str, Any], store: "DiffStore") -> list[Method]:
    """The methods of `evaluate.methods`, `dit` first; without that key, those that need no guesser and can work.

    Raises:
        DitError: a name that is no method.
    """
    named = list(EVALUATE.get(config, "methods"))
    if not named:
        has = {
            GUESSER: False,
            TRIGGER: all(has_trigger(row) for row in store.rows if row["split"] == "test"),
            ATTRIBUTES: any(_labels(store, EVALUATE.get(config, "label")).values()),
            TRIGGER_LABELS: EVALUATE.get(config, "label") == "trigger",
        }
        named = [name for name, one in METHODS.items() if all(has[need] for need in one.needs)]
    return [find_method(name) for name in dict.fromkeys(("dit", *named))]  # the report is about DIT
