"""JSON of any file, ours included: the one parser, with a budget and without ambiguity."""

import json
import math
from typing import Any

MAX_BYTES = 256 * 2**20
MAX_VALUES = 2_000_000  # an index of 100,000 tensors has as many
MAX_DEPTH = 64


class BadJson(ValueError):
    """What is wrong with a text, as the end of a sentence: "is not JSON", "is ambiguous: 'a' occurs twice"."""


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value of a JSON text in UTF-8.

    Args:
        finite: whether to refuse NaN, Infinity and 1e999. Files as a whole may hold them, as Python writes and reads
            them: their numbers are checked where they count.

    Raises:
        BadJson: it is no JSON, has a key twice in one object (`json.loads` would keep the last), or is larger, deeper
            or holds longer numbers than any sound file.
    """
    if len(text) > MAX_BYTES:
        raise BadJson(f"is larger than {MAX_BYTES} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        opened = text.count("[") + text.count("{")
        if opened + text.count(",") > MAX_VALUES:
            raise BadJson(f"holds more than {MAX_VALUES} values")
        value = (_FINITE if finite else _ANY_FLOAT).decode(text)
    except BadJson:
        raise
    except UnicodeDecodeError:
        raise BadJson("is not UTF-8 text") from None
    except RecursionError:
        raise BadJson(_TOO_DEEP) from None
    except ValueError as error:
        too_long = "integer string conversion" in str(error)
        raise BadJson("holds an endless number" if too_long else "is not valid JSON") from None
    if opened > MAX_DEPTH:
        _check_depth(value)
    return value


_TOO_DEEP = f"is nested more than {MAX_DEPTH} deep"


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise BadJson(_TOO_DEEP)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise BadJson(f"is ambiguous: {key[:80]!r} occurs twice")
        found[key] = value
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise BadJson(f"holds {text[:20]}, which is no finite number")
    return number


_ANY_FLOAT = json.JSONDecoder(object_pairs_hook=_unique)
_FINITE = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
