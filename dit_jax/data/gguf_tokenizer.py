"""The tokenizer and chat template in a GGUF file, as transformers builds them from its vocabulary."""

import pathlib
from typing import Any

from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import short
from dit_jax.formats.gguf_file import open_gguf
from dit_jax.formats.json_shape import fits, is_any_number, is_count, is_text

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# What the library takes for granted of its lists, and whether they have an entry for each token.
_LISTS = {
    "tokens": (is_text, True),
    "token_type": (is_count, True),
    "scores": (is_any_number, True),
    "merges": (is_text, False),
}
_PLAIN = ("default", "gpt-2")  # GPT-2's own way to cut a text into words
_SMOLLM = "smollm"  # the same, after every digit is set apart; transformers does not know it


def gguf_tokenizer(path: pathlib.Path) -> Any:
    """The tokenizer of a model, with its chat template.

    Raises:
        DitError: the file has none, or one of an unknown kind: a guess could cut texts where the model does not.
    """
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    file = open_gguf(path)
    said = file.metadata
    vocabulary = {
        ours: said[f"tokenizer.{key}"]
        for key, ours in GGUF_TOKENIZER_MAPPING["tokenizer"].items()
        if f"tokenizer.{key}" in said
    }
    kind = vocabulary.get("pre_tokenizer_type", _PLAIN[0])
    known = (*_PLAIN, _SMOLLM, *GGUF_PRE_TOKENIZER_SPLITS)
    if vocabulary.get("tokenizer_type") == "gpt2" and kind not in known:
        raise DitError(
            f"'{path}' cuts texts into words in a way called {short(kind)}, which is not known here: use the model's "
            "folder in Hugging Face format"
        )
    try:
        tokens = vocabulary.setdefault("tokens", [])
        for name, (entry, each) in _LISTS.items():
            if name not in vocabulary:
                continue
            found = vocabulary[name]
            if not fits(found, [entry]) or (each and len(found) != len(tokens)):
                raise ValueError(f"its list of {name} does not fit")
        template = said.get("tokenizer.chat_template")
        if not (template is None or is_text(template)):
            raise ValueError("its chat template is no text")
        backend, _ = convert_gguf_tokenizer(file.architecture, vocabulary)
        ids = {
            name: i
            for name, key in _SPECIAL.items()
            if (i := said.get(f"tokenizer.ggml.{key}_token_id")) is not None
        }
        if wrong := [name for name, i in ids.items() if not (is_count(i) and i < len(tokens))]:
            raise ValueError(f"its {wrong[0]} token is {short(ids[wrong[0]])} of {len(tokens)}")
        special = {f"{name}_token": tokens[i] for name, i in ids.items()}
        if kind == _SMOLLM:
            digits = pre_tokenizers.Digits(individual_digits=True)
            words = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=template,
            model_max_length=said.get(f"{file.architecture}.context_length", 2**31),
            name_or_path=str(path),
            **special,
        )
    except Exception as e:  # the library raises many kinds
        raise DitError(f"'{path}': the tokenizer cannot be built: {first_line(e)}") from None
