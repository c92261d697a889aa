"""The parser of command lines, flags that several programs have, and types of their values."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dit_jax.errors import DitError, did_you_mean
from dit_jax.formats.files import decode, read_stream, user_path
from dit_jax.models.decoder_config import DTYPES

T = TypeVar("T")


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
            flag, _, value = text.partition("=")
            if value == "--":  # argparse would take it for the end of the flags
                raise DitError(f"{flag} needs a value, not '--'")
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


def checked(convert: Callable[[str], T], holds: Callable[[T], bool], said: str) -> Any:
    """A type for argparse: what `convert` makes of the text, if it `holds`; `said` is what it must be."""

    def parse(text: str) -> T:
        with contextlib.suppress(ValueError):
            if holds(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {said}, not {text!r}")

    return parse


# An empty text is an unset variable of the shell: without it another model would answer.
TEXT = checked(str, lambda text: bool(text.strip()), "some text")
# Of a flag, bash leaves the "~" in --out=~/file to the program.
FILE = checked(lambda text: user_path(TEXT(text)), lambda path: True, "a path")
# More samples, rows or tokens fit no machine: a digit too many would fill its memory.
COUNT = checked(int, lambda number: 1 <= number <= 10**6, "a whole number from 1 to 1000000")
SEED = checked(int, lambda number: 0 <= number < 2**32, "a whole number from 0 to 4294967295")
SHARE = checked(float, lambda number: 0 <= number <= 1, "a number from 0 to 1")
NUMBER = checked(float, lambda number: 0 <= number < math.inf, "a number from 0 up")


def add_model_flags(parser: argparse.ArgumentParser, adapter_required: bool = False) -> None:
    """--base, --adapter, --dtype and --mesh."""
    add = parser.add_argument
    add(
        "--base",
        required=True,
        type=TEXT,
        help="model folder, hub id, or tiny_qwen3 (the embedded model)",
    )
    add(
        "--adapter",
        type=TEXT,
        required=adapter_required,
        help="DIT adapter: an export, a PEFT folder, dit-adapter.pt, or a hub id",
    )
    add(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="type of weights and computation (default %(default)s)",
    )
    add("--mesh", type=TEXT, help="split model and rows over devices: data,fsdp,tensor, e.g. 1,1,4; "
        "--mesh=-1,1,1 takes all (default: one)")  # fmt: skip


def load_base(flags: argparse.Namespace) -> Any:
    """The base model that --base, --dtype and --mesh name. Look at everything else first: it may take minutes."""
    from dit_jax.api import load_model
    from dit_jax.runtime import parallel, startup

    startup.prepare()
    mesh = parallel.make_mesh(parallel.parse_mesh(flags.mesh)) if flags.mesh else None
    return load_model(flags.base, flags.dtype, mesh)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, or of standard input for "-", without empty ones.

    Raises:
        DitError: there is no such file, it is no text, or it has no lines.
    """
    from dit_jax.runtime.artifacts import read_text

    piped = str(path) == "-"
    name = "standard input" if piped else f"'{path}'"
    try:
        if piped:  # as bytes, whatever the terminal's encoding
            text = decode(read_stream(sys.stdin.buffer, name))
        else:
            text = read_text(path, "check the path")
    except UnicodeDecodeError:
        raise DitError(f"{name} is not UTF-8 text: convert it") from None
    except OSError as error:
        raise DitError(f"cannot read {name}: {error.strerror}") from None
    lines = list(filter(None, map(str.strip, text.splitlines())))
    if not lines:
        raise DitError(f"{name} has no lines: write one text a line")
    return lines
