"""The one exception that users see as one line, and what its messages are made with."""

import difflib
import re
from collections.abc import Iterable

MAX_MESSAGE = 1000
_NAME = 200  # characters: to compare longer names takes their product


# Control and bidirectional characters, but tabs and line breaks. Spaces of other widths and joiners are fine in a page.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str, lines: bool = False) -> str:
    """Text with control characters escaped: text from models and files must not reach a reader raw.

    Args:
        lines: for several lines: only what a terminal, a page or the order of its text obeys is escaped (`HIDDEN`).
    """
    if lines:
        return HIDDEN.sub(lambda found: repr(found[0])[1:-1], text)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, or the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """ ": did you mean 'x'?" with the nearest candidate; `otherwise` if none is near."""
    short = [other for other in candidates if len(other) <= _NAME]
    close = difflib.get_close_matches(name, short, n=1) if len(name) <= _NAME else []
    return f": did you mean '{close[0]}'?" if close else otherwise


class DitError(Exception):
    """A failure that the user can act on: its message names the thing and the remedy in one line.

    Line breaks in the message (for example from a library's error) become spaces, control characters are escaped, and
    very long messages (for example with a value from an untrusted file) are cut in the middle.
    """

    def __init__(self, message: str):
        line = printable(" ".join(str(message).split()))
        if len(line) > MAX_MESSAGE:
            line = f"{line[: MAX_MESSAGE // 2]} … {line[-MAX_MESSAGE // 2 :]}"
        super().__init__(line)
