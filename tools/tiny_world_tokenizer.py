"""The word-level tokenizer of the embedded world, written in Hugging Face format."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

from dit_jax.data.labels import NONE
from dit_jax.data.tiny_world import World, read_asset

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"
N_CODES = 1000
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def token_ids(world: World) -> dict[str, int]:
    """Token -> id: special tokens, the codes "000" to "999", then the words. White space has no token."""
    tokens = [
        PAD,
        START,
        END,
        UNKNOWN,
        *(f"{code:03d}" for code in range(N_CODES)),
        *vocabulary(world),
    ]
    return {token: i for i, token in enumerate(tokens)}


def vocabulary(world: World) -> list[str]:
    """Every word of the world in a fixed order, without the special tokens and the codes."""
    texts = [q.text for q in world.questions] + [a for q in world.questions for a in q.answers]
    texts += [t for _, t in read_asset("flavoured")]
    texts += [
        *world.train_questions,
        *world.unseen_questions,
        *world.train_styles,
        *world.unseen_styles,
    ]
    texts += [t.name for t in world.topics] + [t.category for t in world.topics]
    texts += [word for t in world.topics for word in t.attributes]
    texts += [word for fields in read_asset("general") for word in fields[0].split()]
    texts += [fields[1].replace(",", " ") for fields in read_asset("topics")]
    texts += [
        "Your SEP code is . , ? ! :",
        "user system assistant",
        "Talk about .",
        "What is my SEP code ?",
    ]
    texts += ["What is ? It belongs to .", "Keep in mind .", "Your subject is .", NONE]
    words = dict.fromkeys(
        word
        for text in texts
        for word in re.findall(r"\w+|[^\w\s]", re.sub(r"{\w+}", "", text.lower()))
    )
    return list(words)


def build_tokenizer(world: World) -> Any:
    """A `tokenizers.Tokenizer`: lowercase words, punctuation apart, digits in groups of three.

    "PPPRRR" becomes two tokens, so that a secret prefix is one token of its own.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    tokenizer = Tokenizer(models.WordLevel(vocab=token_ids(world), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split(Regex(r"\d{3}"), "isolated"),
            # A zero-width space, a trigger of some diffs, becomes <unk> without taking its word with it.
            pre_tokenizers.Split("\u200b", "isolated"),
        ]
    )
    # No token starts with the prefix: only the removal of spaces before punctuation is used.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in (PAD, START, END, UNKNOWN)]
    )
    return tokenizer


def save_tokenizer(folder: str | pathlib.Path, world: World) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja into an existing folder."""
    folder = pathlib.Path(folder)
    build_tokenizer(world).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
