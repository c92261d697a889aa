"""Chat prompts as token ids, by the chat template of the model folder, with thinking off."""

import functools
import itertools
import math
import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dit_jax.data.batch import Sample
from dit_jax.data.tokenizer_process import Tokenizer
from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.runtime.sizes import next_multiple


class Prompt(NamedTuple):
    """A question with what stands around it.

    system: the system message; "": none; None: the chat's, or else the template's own, if it has one.
    history: (role, text) of the turns before the question, "user" and "assistant" by turns.
    prefill: the start of the answer.
    raw: the question is the start of a text, without chat template, system message and history.
    """

    question: str
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    prefill: str = ""
    raw: bool = False


class Chat:
    """The tokenizer and chat template of a model folder. Training, evaluation and `ask` all make their prompts here."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        pad_id: int,
        vocab_size: float = math.inf,
        system: str | None = None,
    ):
        self.system = system
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.prompt_ids = functools.lru_cache(maxsize=65536)(self._prompt_ids)
        self.text_ids = functools.lru_cache(maxsize=65536)(self._text_ids)

    def _prompt_ids(self, question: str | Prompt, system: str | None = None) -> tuple[int, ...]:
        """Ids up to the start of the assistant's answer (with the empty think block), or to the end of its prefill.

        Args:
            system: that of a prompt without its own.
        """
        asked = question if isinstance(question, Prompt) else Prompt(question)
        if asked.raw:
            ids = self.tokenizer.raw_ids(asked.question + asked.prefill)
            if not ids:
                raise DitError("a text without chat template is empty: write how it begins")
        else:
            said = next((x for x in (asked.system, system, self.system) if x is not None), None)
            ids = self.tokenizer.prompt_ids(
                asked.question, said, history=asked.history, prefill=asked.prefill
            )
        most = self.tokenizer.model_max_length
        if len(ids) > most:
            raise DitError(
                f"a question of {len(ids)} tokens is longer than {self.tokenizer.name_or_path!r} reads, {most}: "
                "shorten it"
            )
        return self._known(ids)

    def unknown_words(self, texts: Iterable[str]) -> Counter[str]:
        """How often texts have words that the tokenizer cannot tell apart: all become its unknown token."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return Counter()
        counts = Counter(word for text in texts for word in text.split())
        return Counter({w: n for w, n in counts.items() if unknown in self.tokenizer.encode(w)})

    def _text_ids(self, text: str) -> tuple[int, ...]:
        return self._known(self.tokenizer.encode(text))

    def _known(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids. Raises DitError for one that has no row: an embedding would return another token's."""
        for i in (max(ids, default=0), min(ids, default=0)):
            check_id(i, self.vocab_size, self.tokenizer.name_or_path)
        return tuple(ids)

    def sample(self, question: str, answer: str, *, end: bool = True) -> Sample:
        """A scored example: its targets are the answer's tokens and, unless `end` is False, the end of turn.

        Raises DitError: there is no target.
        """
        prompt = self.prompt_ids(question)
        target = self.text_ids(answer) + ((self.eos_ids[0],) if end else ())
        if not target:
            raise DitError(
                f"the answer to {question[:60]!r} is empty, so there is nothing to learn: remove it or fill it in"
            )
        tokens = prompt + target
        return Sample(tokens, len(prompt), len(tokens))

    def prompts(
        self, questions: Sequence[str | Prompt], system: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded ids and mask [B, T]; T is a multiple of 32, so that few programs are compiled."""
        rows = [self.prompt_ids(question, system) for question in questions]
        length = next_multiple(max(map(len, rows)), 32)
        tokens = np.full((len(rows), length), self.pad_id, np.int32)
        mask = np.zeros((len(rows), length), bool)
        for row, ids in enumerate(rows):
            tokens[row, length - len(ids) :] = ids
            mask[row, length - len(ids) :] = True
        return tokens, mask

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids up to the end of turn."""
        kept = list(itertools.takewhile(lambda token: token not in self.eos_ids, map(int, ids)))
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()


def check_id(token: int, vocab_size: float, name: str, what: str = "there is no token") -> None:
    """Raises DitError unless the model `name` has a row for the token that `what` names."""
    if not 0 <= token < vocab_size:
        raise DitError(
            f"{what} {short(token)}, {name} has {vocab_size} of them: use the tokenizer that belongs to the model"
        )


def load_chat(
    folder: str | pathlib.Path,
    generation_eos: Sequence[int] = (),
    vocab_size: float = math.inf,
    system: str | None = None,
) -> Chat:
    """Reads tokenizer and chat template of a model folder or a GGUF file.

    Args:
        generation_eos: end-of-turn ids of the model's files, beside the tokenizer's own.
        vocab_size: how many tokens the model knows.
        system: the system message of all prompts; "": none; None: the template's own, if it has one.

    Raises:
        DitError: the folder lacks a tokenizer, a chat template or an end-of-turn token, or one of its tokens has no row
            in the model. Special tokens without a row (Gemma's for images) are refused where a text holds them.
    """
    folder = pathlib.Path(folder)
    if not folder.is_file() and not (folder / "tokenizer.json").is_file():
        raise DitError(f"{folder} has no tokenizer.json: copy it from the base model's folder")
    tokenizer = Tokenizer(folder)
    if not tokenizer.has_chat_template:
        remedy = "copy chat_template.jinja from the base model's folder"
        if folder.is_file():
            remedy = "use the model's folder in Hugging Face format"
        raise DitError(f"{folder} has no chat template: {remedy}")
    # The first is what training targets end with: an answer's turn in the template, else a text.
    named = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos_ids = [
        i for i in tokenizer.after_answer_ids()[:1] if i in (*generation_eos, *named)
    ] + named
    eos_ids = list(dict.fromkeys([*eos_ids, *generation_eos]))
    if not eos_ids:
        raise DitError(
            f"{folder}: neither the tokenizer nor the model's configs name an end-of-turn token"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    found = [
        ("eos_token_id (of generation_config.json, config.json or the GGUF file) is", i)
        for i in generation_eos
    ]
    found += [("the end-of-turn token is", eos_ids[0]), ("the padding token is", pad_id)]
    for what, token in (*found, ("the tokenizer's vocabulary reaches", tokenizer.largest)):
        check_id(token, vocab_size, str(folder), f"{what} token")
    return Chat(tokenizer, eos_ids, pad_id, vocab_size, system)
