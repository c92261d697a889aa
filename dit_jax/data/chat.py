"""Chat prompts as token ids, by the chat template of the model folder, with thinking off."""

import functools
import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.data.batch import Sample
from dit_jax.data.chat_template import Template
from dit_jax.data.gguf_tokenizer import gguf_tokenizer
from dit_jax.errors import DitError, first_line


class Chat:
    """The tokenizer and chat template of a model folder. Training, evaluation and `ask` all make their prompts here."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int], pad_id: int):
        self.tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.template = Template(tokenizer)
        self.prompt_ids = functools.lru_cache(maxsize=65536)(self._prompt_ids)
        self.text_ids = functools.lru_cache(maxsize=65536)(self._text_ids)

    def _prompt_ids(self, question: str, system: str | None = None) -> tuple[int, ...]:
        """Ids of one user turn, up to the start of the assistant's answer (with the empty think block).

        Args:
            system: the system message; None: the template's own, if it has one.
        """
        text = self.template.prompt(question, system)
        # Not verbose: too many tokens are an error below.
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        most = self.tokenizer.model_max_length
        if len(ids) > most:
            raise DitError(
                f"a question of {len(ids)} tokens is longer than {self.tokenizer.name_or_path!r} reads, {most}: "
                "shorten it"
            )
        return tuple(int(i) for i in ids)

    def _text_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

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
        self, questions: Sequence[str], system: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Left-padded ids and mask [B, T]; T is a multiple of 32, so that few programs are compiled."""
        rows = [self.prompt_ids(question, system) for question in questions]
        length = -(-max(map(len, rows)) // 32) * 32
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


def load_chat(folder: str | pathlib.Path, generation_eos: Sequence[int] = ()) -> Chat:
    """Reads tokenizer and chat template of a model folder or a GGUF file.

    Args:
        generation_eos: end-of-turn ids of `generation_config.json`, beside the tokenizer's own.

    Raises:
        DitError: the folder lacks a tokenizer, a chat template or an end-of-turn token.
    """
    # Without its advice to install PyTorch: only tokenizers are used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    folder = pathlib.Path(folder)
    if folder.suffix.lower() == ".gguf":
        tokenizer = gguf_tokenizer(folder)
    elif not (folder / "tokenizer.json").is_file():
        raise DitError(f"{folder} has no tokenizer.json: copy it from the base model's folder")
    else:
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
        except Exception as e:  # the library raises many kinds
            raise DitError(f"{folder}: the tokenizer cannot be read: {first_line(e)}") from None
    if tokenizer.chat_template is None:
        raise DitError(
            f"{folder} has no chat template: copy chat_template.jinja from the base model's folder"
        )
    # The first is what training targets end with: an answer's turn in the template, else a text.
    eos_ids = [*_end_of_turn(tokenizer, generation_eos)]
    eos_ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    eos_ids = list(dict.fromkeys([*eos_ids, *generation_eos]))
    if not eos_ids:
        raise DitError(
            f"{folder}: neither the tokenizer nor generation_config.json names an end-of-turn token"
        )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    return Chat(tokenizer, eos_ids, pad_id)


def _end_of_turn(tokenizer: Any, generation_eos: Sequence[int]) -> list[int]:
    """The token that ends an answer in the chat template, as Gemma's <end_of_turn>; [] where no known one does."""
    after = tokenizer.encode(Template(tokenizer).after_answer().lstrip(), add_special_tokens=False)
    return [i for i in after[:1] if i in (*generation_eos, tokenizer.eos_token_id)]
