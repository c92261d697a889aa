"""What every source of rows gives, and the limits that hold for all of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError
from dit_jax.formats.files import short

MAX_COLUMNS = 1_000
MAX_FIELD = 2**24  # characters of one field: a stray quote must not swallow a file of gigabytes
MAX_LINE = 2 * MAX_FIELD
UNKNOWN = 2**62  # bytes: more than any corpus


@dataclasses.dataclass(frozen=True)
class Record:
    """A row: its number (the line in a text file, else counted from 1), its values, or what is wrong with it."""

    number: int
    values: Mapping[str, Any]
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A table that can be read any number of times.

    name: for messages. columns: their names. read: yields rows that hold at least the given columns. size: bytes on the
    disk, `UNKNOWN` of what the hub has.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Collection[str]], Iterator[Record]]
    size: int = UNKNOWN


def columns_of(path: Path | str, names: Collection[str]) -> tuple[str, ...]:
    """The names of a table's columns. Raises DitError: two are the same, or there are too many."""
    if len(names) > MAX_COLUMNS:
        raise DitError(
            f"'{path}' has {len(names)} columns, more than {MAX_COLUMNS}: check the file"
        )
    name, count = Counter(list(names)).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise DitError(f"'{path}' has two columns {short(name)}: rename one")
    return tuple(names)


def checked(number: int, values: Mapping[str, Any]) -> Record:
    """A row whose texts are not too long."""
    long = next((k for k, x in values.items() if isinstance(x, str) and len(x) > MAX_FIELD), None)
    if long is None:
        return Record(number, values)
    return Record(number, {}, f"{short(long)} has more than {MAX_FIELD} characters")


def named(classes: Mapping[str, Sequence[str]], column: str, value: Any) -> Any:
    """A value, with the name of a class in place of its number; None for a row without a class (-1)."""
    names = classes.get(column)
    if names is None or value is None:
        return value
    return names[value] if 0 <= value < len(names) else None
