"""Text that leaves the program. Models, diffs and files write part of it, and terminals and spreadsheets obey text.

Terminals: `show`. CSV files: `csv_text`, read back by `from_cell`. JSON: `json_text`. Pages of HTML and Markdown escape
in `report.html` and `report.markdown`, plots in `report.plots`. `tests/test_exits.py` lists who writes.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dit_jax.errors import HIDDEN, printable

# What spreadsheets compute, also in the wide forms of other keyboards. An apostrophe before it makes it a text.
_FORMULA = re.compile("(?='*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")
_QUOTED = re.compile("'(?='*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
_ESCAPE = re.compile(r"\\(?=u[0-9a-f]{4})")
_ESCAPED = re.compile(r"\\u([0-9a-f]{4})")


def show(text: str, error: bool = False) -> None:
    """Prints text to stdout, or stderr, with control and bidirectional characters escaped."""
    print(printable(text, lines=True), file=sys.stderr if error else sys.stdout, flush=True)


def json_text(value: Any, default: Callable[[Any], Any] | None = None, **options: Any) -> str:
    """JSON in UTF-8, control and bidirectional characters escaped as JSON does."""
    return _hidden(json.dumps(value, ensure_ascii=False, default=default, **options))


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A CSV file with a header; None becomes an empty field. `from_cell` gives the texts back."""
    lines = [_line(columns), *(_line([row.get(name) for name in columns]) for row in rows)]
    return "".join(lines)


def from_cell(cell: str) -> str:
    """The text that `csv_text` wrote as this cell."""
    if cell[:1] == "'" and _QUOTED.match(cell):
        cell = cell[1:]
    if "\\u" not in cell:  # large stores have a million cells
        return cell
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), cell)


def _line(fields: Sequence[Any]) -> str:
    text = io.StringIO()
    # Python quotes what is in the line's end, up to 3.12 nothing else: a lone "\r" would end the row for readers.
    csv.writer(text, lineterminator="\r\n").writerow(map(_cell, fields))
    return text.getvalue().removesuffix("\r\n") + "\n"


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = _hidden(_ESCAPE.sub(r"\\u005c", value))
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _hidden(text: str) -> str:
    """Text without HIDDEN characters but the end of a line."""
    return HIDDEN.sub(lambda x: x[0] if x[0] == "\r" else f"\\u{ord(x[0]):04x}", text)
