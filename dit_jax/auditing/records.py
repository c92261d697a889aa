"""What a part of an audit holds: its folder may be a stranger's, and its digests are its own."""

from typing import Any, TypeGuard

from dit_jax.evaluate.method_table import READERS
from dit_jax.formats.json_shape import fits, is_count, is_number, is_switch, is_text, maybe

_READING = {
    "answers": [
        {
            "question": is_text,
            "answer": is_text,
            "guess": is_text,
            "logprob": maybe(is_number),
            "cut": is_switch,
        }
    ],
    "name": is_text,
    "share": is_number,
    "distinct": is_count,
    "question": is_text,
    "text": is_text,
    "logprob": maybe(is_number),
    "ratio": is_number,
    "none": maybe(is_number),
    "otherwise": is_text,
    "evidence": (is_number, is_number),
    "features": (is_number, is_number),
}
_TEXTS = {"prompt": is_text, "base": is_text, "finetuned": is_text}
_RECORD = {
    "name": is_text,
    "path": is_text,
    "number": is_count,
    "label": maybe(is_text),
    "digest": is_text,
    "said": {},
    "notes": [is_text],
    "zero": is_switch,
    "rank": maybe(is_count),
    "modules": [is_text],
    "norm": is_number,
    "effective_rank": is_number,
    "energy": [is_number],
    "energy_outside": is_number,
    "unusual": maybe(is_number),
    "kl": maybe(is_number),
    "prompts": [{**_TEXTS, "kl": maybe(is_number)}],
    "trigger": maybe(
        {
            **_TEXTS,
            "behaviour": is_text,
            "trigger": is_text,
            "nats": is_number,
            "others": is_number,
            "candidates": is_count,
        }
    ),
    "readers": {name: {"words": [is_text], "says": is_text} for name in READERS},
    "reading": _READING,
    "faithful": {"kept": is_count, "layers": maybe(is_number), "words": maybe(is_number)},
    "noise": {**_READING, "same_answer": maybe(is_number)},
    "other": maybe({"name": is_text, "same_answer": maybe(is_number)}),
}


def is_record(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is the record of a diff, or says why one could not be read."""
    if isinstance(value, dict) and "error" in value:
        return fits(value, {"name": is_text, "error": is_text})
    return fits(value, _RECORD)
