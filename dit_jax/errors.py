"""The one exception that users see as one line, and what its messages are made with."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

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


class _Once(argparse.Action):
    """A flag that may be given once: argparse would take the last value and drop the others in silence."""

    _given_in: Any = None

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        if self._given_in is namespace and option:
            before = getattr(namespace, self.dest)
            raise DitError(
                f"{option} is given twice ('{before}' and '{values}'), and takes one value: use one of them"
            )
        self._given_in = namespace
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Reads a command line inside `exit_on_error`, so that a mistake in it is one line, too.

    description: is shown as it is written.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter)
        self.register("action", None, _Once)  # of flags that name no other action

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does. Raises DitError for an unknown flag before a missing one: it may be that one, misspelt."""
        given = list(sys.argv[1:] if args is None else args)
        flags = given[: given.index("--")] if "--" in given else given
        known = [flag for action in self._actions for flag in action.option_strings]
        for text in flags:
            flag = text.partition("=")[0]
            if flag.startswith("--") and not any(one.startswith(flag) for one in known):
                listed = f": '{self.prog} --help' lists the flags"
                # Of a key, as in --confg.seed, only the flag before it can be misspelt.
                hint = did_you_mean(flag.partition(".")[0], known, listed)
                raise DitError(f"unrecognized arguments: {text}{hint}")
        return super().parse_args(given, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse does, which ignores that an output is closed or its disk full."""
        file = file or sys.stdout
        file.write(message)
        file.flush()

    def error(self, message: str) -> NoReturn:
        raise DitError(f"{message}: '{self.prog} --help' lists the flags")
