"""What every command line program does with a failure: one line on stderr and an exit status, never a traceback."""

import contextlib
import errno
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from dit_jax.errors import DitError, first_line
from dit_jax.runtime import interrupts, os_errors
from dit_jax.runtime.outgoing import show

# What jax says of its settings in the environment, while it is imported.
_OF_JAX = re.compile("for JAX flag|for environment 'JAX_|^jax.default_device must")
_OF_OTHERS = re.compile(
    r"""(?:int|float)\(os\.(?:environ\.get\(|getenv\(|environ\[)["'](\w+)|int_env\(["'](\w+)"""
)
EXIT_ERROR = 2  # the same code that argparse uses for a bad command line


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Runs a command line program: a `DitError`, what the system refuses and Ctrl-C become one line and a status.

    Raises:
        SystemExit: with status 2 after a DitError, lack of memory, a package that is not installed or a refusal of the
            system, and 130 after Ctrl-C. Other exceptions are bugs and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know a character
    try:
        _check_folder()
        yield
        _flush()
    except KeyboardInterrupt:
        _stop(interrupts.INTERRUPTED, interrupts.EXIT_INTERRUPTED)
    except Exception as error:
        problem = explained(error)
        if problem is None:
            raise
        _stop(f"error: {problem}", EXIT_ERROR)


def status_of(program: Callable[[], int | None]) -> int:
    """Runs a command line program inside `exit_on_error` and returns its exit code; None of the program is 0."""
    try:
        with exit_on_error():
            return program() or 0
    except SystemExit as stop:
        return int(stop.code or 0)


def start(module: str, function: str = "main") -> NoReturn:
    """Imports a command line program, runs it, and ends the process with the status that it returns."""
    interrupts.end_at_once()  # before the imports, which take seconds
    with exit_on_error():
        status = getattr(importlib.import_module(module), function)()
    sys.exit(status)


def explained(error: BaseException) -> DitError | None:
    """An error as what users see of it; None for a bug."""
    if isinstance(error, DitError):
        return error
    number = os_errors.os_error(error)
    if number == errno.EPIPE:
        return DitError("the output was closed before the end: what was written until then is kept")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return DitError(
            f"out of memory ({first_line(error)[:200]}): lower what is computed at once, use --dtype bfloat16 (in "
            "a config model.dtype), or split it over more devices ('python -m dit_jax.plan' says what fits)"
        )
    if isinstance(error, ValueError):
        name, said = _setting(error), first_line(error)
        if name or _OF_JAX.search(said):
            said = f"{name} is no number ({said})" if name else said
            return DitError(f"{said}: unset it in the environment, or give what the library takes")
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing not in ("", "dit_jax"):
        return DitError(
            f"{sys.executable} has no package '{missing}': enter the project's environment (source "
            ".venv/bin/activate), or install it (pip install -e .)"
        )
    if os_errors.has_remedy(number):
        name = getattr(error, "filename", None)
        place = f"cannot use '{name}': " if name else ""
        return DitError(f"{place}{os_errors.reason(number or 0)}")
    return None


def _setting(error: BaseException) -> str | None:
    """The variable of the environment of which a library made no number."""
    for frame in traceback.extract_tb(error.__traceback__):
        if found := _OF_OTHERS.search(frame.line or ""):
            return found[1] or found[2]
    return None


def _check_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise DitError("the working directory was deleted: change to another one") from None


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()  # here its error is still one line


def _stop(line: str, status: int) -> None:
    with contextlib.suppress(OSError):
        show(line, error=True)
    for stream in (sys.stdout, sys.stderr):  # Python's flush at exit must not fail again
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(status) from None
