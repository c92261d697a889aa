"""Damaged files: what a stranger may have done to a good one, by chance and by its structure."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

_PIECES = (
    b"\0", b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", b"9" * 40, b'"', b"[", b"{", b"../", b"-1", b"1e999", b"null",
    b"cos\nsystem\n(S'touch CANARY'\ntR.", b"R", b"b", b"\x81", b"PK\1\2", b"PK\5\6", b"NaN", b",", b"\n", b"=1+1",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, 2**31, 2**63, 2**70, -(2**40), 1e308, float("nan"), float("inf"), 1e-320,
    "", "x", "../x", "/etc/passwd", "\0", "\ud800", "\x1b[2J", "9" * 400, "x" * 200_000, [], {}, [[]], [1, 2], {"a": 1},
    ["x"] * 5_000, [0] * 100_000, {"x" * 10_000: 1},
)  # fmt: skip


def some_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cuts, flips, replaces, inserts, deletes or copies at one to four places, often near the ends."""
    content = bytearray(data)
    if rng.random() < 0.1:
        return bytes(content[: rng.randrange(len(content))]) if content else b""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = max(len(content), 1)
        share = rng.choice((rng.random(), 0.02 * rng.random(), 1 - 0.02 * rng.random()))
        start, piece = int(share * (size - 1)), rng.choice(_PIECES)
        match rng.randrange(5):
            case 0 if content:
                content[start] ^= 1 << rng.randrange(8)
            case 1:
                content[start : start + len(piece)] = piece
            case 2:
                content[start:start] = piece
            case 3:
                del content[start : start + rng.randint(1, 64)]
            case _:
                other = rng.randrange(size)
                content[start:start] = content[other : other + 64]
    return bytes(content)


def _json_value(value: Any, rng: random.Random) -> Any:
    """The value with one entry, at any depth, replaced, left out or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(_VALUES)
    if isinstance(value, list):
        i = rng.randrange(len(value))
        return (
            value[:i]
            + rng.choice(([], [_json_value(value[i], rng)], [value[i]] * 2))
            + value[i + 1 :]
        )
    key = rng.choice(sorted(value))
    changed = {k: x for k, x in value.items() if k != key}
    match rng.randrange(4):
        case 0:
            return changed
        case 1:
            return changed | {f"{key}{rng.choice(('x', '.', ' '))}": value[key]}
        case _:
            return changed | {key: _json_value(value[key], rng)}


def some_json(data: bytes, rng: random.Random) -> bytes:
    """Changes bytes, or entries of the value."""
    if rng.random() < 0.4:
        return some_bytes(data, rng)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        value = _json_value(value, rng)
    return json.dumps(value).encode()


def some_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Changes bytes, or entries of the header, whose length then agrees."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        return some_bytes(data[: 8 + size], rng) + data[8 + size :]
    header = some_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def some_torch(data: bytes, rng: random.Random) -> bytes:
    """Changes bytes of the archive, or of an entry, whose checksum then agrees."""
    if rng.random() < 0.4:
        return some_bytes(data, rng)
    stored = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stored, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        changed = rng.choice(pickles if rng.random() < 0.8 else names)
        for name in names:
            content = old.read(name)
            new.writestr(name, some_bytes(content, rng) if name == changed else content)
    return stored.getvalue()


_THINGS = (
    "messages", "messages[0].content", "messages[0]", "7", "'a'", "range(99999)", "''.__class__", "cycler", "namespace",
    "lipsum", "self", "joiner", "messages.append", "raise_exception", "strftime_now", "tools", "undefined", "-1",
)  # fmt: skip
_DONE = (
    "* 4000000000", "** 99999", " | join", " | tojson(indent=99999999)", " | sort | list", " | list", "[0]",
    ".__globals__", " | attr('__class__')", " | map('upper') | list", " | center(4000000000)", ".format(1)", "()",
    " | replace('a', 'b' * 99999)", ".__init__.__globals__.os.system('touch CANARY')", " ~ messages", " | length",
    ".__class__.__mro__[1].__subclasses__()", "('touch CANARY')", " | batch(3) | list", " % 1", " is defined",
)  # fmt: skip


def _expression(rng: random.Random) -> str:
    return rng.choice(_THINGS) + "".join(rng.choice(_DONE) for _ in range(rng.randint(0, 3)))


def _statement(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(7 if depth < 3 else 3)
    inner = (
        "".join(_statement(rng, depth + 1) for _ in range(rng.randint(0, 2))) if kind > 2 else ""
    )
    match kind:
        case 0 | 1:
            return f"{{{{ {_expression(rng)} }}}}"
        case 2:
            return f"{{% set a = {_expression(rng)} %}}{{{{ a }}}}"
        case 3:
            return f"{{% for m in {_expression(rng)} %}}{inner}{{% endfor %}}"
        case 4:
            return f"{{% macro f(a) %}}{inner}{{{{ f(a) }}}}{{% endmacro %}}{{{{ f(1) }}}}"
        case 5:
            return f"{{% if {_expression(rng)} %}}{inner}{{% else %}}x{{% endif %}}"
    return rng.choice(
        (
            f"{{% include 'CANARY' %}}{inner}",
            f"{{% import 'os' as os %}}{inner}",
            f"{{# {inner} #}}",
        )
    )


def some_template(data: bytes, rng: random.Random) -> bytes:
    """Changes bytes of the template, or adds statements of its language."""
    if rng.random() < 0.5:
        return some_bytes(data, rng)
    added = "".join(_statement(rng) for _ in range(rng.randint(1, 3))).encode()
    return data + added if rng.random() < 0.5 else added + data
