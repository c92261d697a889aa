"""The one exception that users see as one line, and the wrapper that prints it."""

import argparse
import contextlib
import difflib
import io
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

EXIT_ERROR = 2  # the same code that argparse uses for a bad command line
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what shells expect after Ctrl-C
MAX_MESSAGE = 1000


def printable(text: str) -> str:
    """Text with control characters escaped: text from models and files must not reach a terminal raw."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, or the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """ ": did you mean 'x'?" with the nearest candidate; `otherwise` if none is near."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
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


class Parser(argparse.ArgumentParser):
    """Reads a command line inside `exit_on_error`, so that a mistake in it is one line, too.

    description: is shown as it is written.
    """

    def __init__(self, prog: str, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        raise DitError(f"{message}: '{self.prog} --help' lists the flags")


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Runs a command line program: a `DitError`, lack of memory and Ctrl-C become one line and an exit status.

    Raises:
      SystemExit: with status 2 after a DitError or lack of memory, and 130 after Ctrl-C. Other exceptions are bugs and
        keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know a character
    try:
        yield
    except DitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from None
    except Exception as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        problem = DitError(
            f"out of memory ({first_line(error)[:200]}): lower what is computed at once, or split it over more devices "
            "('python -m dit_jax.plan' says what fits)"
        )
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        print(
            "interrupted: what was finished is kept, run the same command again to go on",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_INTERRUPTED) from None
