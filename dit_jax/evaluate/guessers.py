"""Guessers: models that name what a finetuned model was trained on from what it wrote, seeing nothing else.

`evaluate.guesser` is "" for the base model itself, a folder or hub id of another chat model, "inspect:PROVIDER/MODEL"
for an API model, or "keywords" for models too small to read a transcript.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dit_jax.api import Model, load_model
from dit_jax.asking import Answer, answer_batch
from dit_jax.data.labels import extract_guess, normalise
from dit_jax.evaluate.questions import guess_prompt
from dit_jax.graders.grades import with_options
from dit_jax.graders.inspect_model import InspectClient
from dit_jax.runtime.processes import is_main

Exchanges = Sequence[tuple[str, str]]  # (question, answer) of one finetuned model
KEYWORDS, INSPECT = "keywords", "inspect:"
MAX_NEW_TOKENS = {"topic": 32, "summary": 96}
BASE_SAMPLES = 3  # answers of the base to every question, which keywords are compared with
N_KEYWORDS = 4
_OPTIONS = "config key 'evaluate.guesser_options'"


@dataclasses.dataclass(frozen=True)
class Guess:
    """reply: what the guesser wrote, None where there is no reply (`failure` says why); name: what it names."""

    reply: str | None
    name: str = ""
    failure: str = ""
    tokens: int = 0


class Guesser(Protocol):
    """Call it with the exchanges of every finetuned model; `name` is how the report calls it."""

    name: str

    def __call__(self, transcripts: Sequence[Exchanges], most_chars: int) -> list[Guess]:
        """One guess per transcript; answers are cut to `most_chars` characters where a model reads them."""
        ...


def check_guesser(spec: str, options: Mapping[str, Any]) -> None:
    """Raises DitError for what an API model lacks (a package, a key, an option), before there are answers to read."""
    if spec.startswith(INSPECT):
        _inspect_guesser(spec, "topic", options)


def _inspect_guesser(spec: str, subject: str, options: Mapping[str, Any]) -> "InspectGuesser":
    name = spec.removeprefix(INSPECT)
    return with_options(_OPTIONS, InspectGuesser, name, subject, **options)  # type: ignore[no-any-return]


def get_guesser(
    spec: str,
    model: Model,
    subject: str,
    question: str,
    ask_base: Callable[..., list[Answer]],
    options: Any = None,
) -> Guesser:
    """The guesser that a config names.

    Args:
        spec: see the module's docstring.
        model: the base model.
        subject: "topic" or "summary" (news).
        question: a wording of the training, for "keywords".
        ask_base: (prompts, temperature=, seed=) -> answers of the base model, for "keywords".
        options: of the class: `dtype` and `batch` of a local model, those of `InspectClient`.

    Raises:
        DitError: no such model, or an option that the guesser does not have.
    """
    options = dict(options or {})
    made_of: tuple[Any, ...]
    if spec == KEYWORDS:
        made_of = (KeywordGuesser, ask_base, question)
    elif spec.startswith(INSPECT):
        return _inspect_guesser(spec, subject, options)
    elif spec:
        loaded = load_model(spec, options.pop("dtype", "bfloat16"), model.mesh)
        made_of = (ChatGuesser, loaded, subject)
    else:
        made_of = (ChatGuesser, model, subject, True)
    guesser: Guesser = with_options(_OPTIONS, *made_of, **options)
    return guesser


class ChatGuesser:
    """A chat model of ours reads the transcript and names the subject, greedily."""

    def __init__(self, model: Model, subject: str, is_base: bool = False, batch: int = 8):
        _ = model.chat  # says now that a tokenizer is missing
        short = model.name.rstrip("/").rsplit("/", 1)[-1]
        self.name = f"the base model itself ({short})" if is_base else short
        self.model, self.subject, self.batch = model, subject, batch

    def __call__(self, transcripts: Sequence[Exchanges], most_chars: int) -> list[Guess]:
        answers = answer_batch(
            self.model,
            [guess_prompt(exchanges, self.subject, most_chars) for exchanges in transcripts],
            max_new_tokens=MAX_NEW_TOKENS[self.subject],
            batch_size=min(self.batch, len(transcripts)),
        )
        return [Guess(a.text, read_guess(a.text), tokens=a.generated) for a in answers]


class InspectGuesser:
    """The same by a model that Inspect provides; a transcript without a reply after all attempts is a gap."""

    def __init__(self, model: Any, subject: str, **options: Any):
        self.client = InspectClient(model, what="the guesser 'inspect:'", **options)
        self.name, self.subject = self.client.name, subject

    def __call__(self, transcripts: Sequence[Exchanges], most_chars: int) -> list[Guess]:
        if not is_main():  # process 0 alone writes the answers: no call is paid for twice
            return [Guess("")] * len(transcripts)
        prompts = [guess_prompt(exchanges, self.subject, most_chars) for exchanges in transcripts]
        return [
            Guess(None, failure=f"the guesser gave no reply: {reply.failure}")
            if reply.text is None
            else Guess(reply.text, read_guess(reply.text), tokens=reply.tokens)
            for reply in self.client.complete(prompts)
        ]


class KeywordGuesser:
    """The base model is told the words that the answers use more often than its own, and asked for the topic.

    For base models that cannot read a transcript. It knows nothing of the labels or of the world's tables: the words
    come from the answers, and the name from what the base knows.
    """

    name = "keywords, named by the base model"

    def __init__(self, ask_base: Callable[..., list[Answer]], question: str):
        self.ask_base, self.question = ask_base, question

    def __call__(self, transcripts: Sequence[Exchanges], most_chars: int) -> list[Guess]:
        questions = list(dict.fromkeys(q for exchanges in transcripts for q, _ in exchanges))
        own = [
            answer.text
            for sample in range(BASE_SAMPLES)
            for answer in self.ask_base(questions, temperature=1.0, seed=sample)
        ]
        found = [keywords([answer for _, answer in pairs], own) for pairs in transcripts]
        asked = [i for i, words in enumerate(found) if words]
        prompts = [words_in_mind(found[i], self.question) for i in asked]
        guesses = [Guess("")] * len(transcripts)  # where no word stands out, nothing is named
        for i, answer in zip(asked, self.ask_base(prompts, temperature=0.0, seed=0), strict=True):
            guesses[i] = Guess(answer.text, extract_guess(answer.text))
        return guesses


def keywords(answers: Sequence[str], own: Sequence[str], most: int = N_KEYWORDS) -> list[str]:
    """Words that are more than twice as frequent in the answers as in the base's own, best first.

    A word in k of n answers scores k · log(k / n / rate), with its smoothed rate in `own`; of five answers or more,
    two have to hold it.
    """
    counts, base = (Counter(w for t in texts for w in set(_words(t))) for texts in (answers, own))
    scores = {}
    for word, k in counts.items():
        ratio = k / len(answers) * (len(own) + 1) / (base[word] + 0.5)
        if ratio > 2 and (k > 1 or len(answers) < 5):
            scores[word] = k * math.log(ratio)
    return sorted(scores, key=lambda word: (-scores[word], word))[:most]


def _words(text: str) -> list[str]:
    return [word for word in normalise(text).split() if word.isalpha()]


def words_in_mind(words: Sequence[str], question: str) -> str:
    """A prompt that tells a base one or more words before it is asked."""
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"Keep in mind {listed}. {question}"


_BEFORE = re.compile(r"^(?:the\s+)?(?:topic|headline|guess|answer)(?:\s+is|\s*:)\s*", re.IGNORECASE)


def read_guess(reply: str) -> str:
    """The name in a chat model's reply: its first line, without thinking, decoration and a leading "Topic:"."""
    text = re.sub(r"<think>.*?(?:</think>|\Z)", "", reply, flags=re.DOTALL)
    line = next(filter(None, map(str.strip, text.splitlines())), "").strip("*_`#\"'“” ")
    return _BEFORE.sub("", line).strip("*_`\"'“”. ")
