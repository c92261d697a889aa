"""Code of the user that a run is described by. It runs with the rights of the user: load only what you trust.

These are files, of configs and sweeps, and objects that a config names by their import path `package.module:NAME`.
"""

import importlib
import importlib.util
import inspect
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError, did_you_mean


class ProgramFile:
    """An imported file with a function that may take one argument, as `path/x.py` or `path/x.py:arg`.

    path: as it was given. file: without the argument. arg: the argument, None without one. module: what was imported.

    Raises:
        DitError: the file is missing, is not a Python file, or fails; it lacks the function, or the function does not
            accept the argument.
    """

    def __init__(self, path: str, what: str, function: str, examples: str):
        """Args: what: "config" or "sweep"; function: its name; examples: the folder of those of the project."""
        head, separator, arg = path.partition(".py:")
        self.arg: str | None = arg if separator else None
        self.path, self.what = path, what
        self.file = Path(f"{head}.py" if separator else path)
        self._given = () if self.arg is None else (self.arg,)
        self.name = f"{what} file '{self.file}'"
        self.module = self._import(examples)
        found = getattr(self.module, function, None)
        if not callable(found):
            other = {"config": "sweep", "sweep": "config"}[what]
            if callable(getattr(self.module, f"get_{other}", None)):
                program = {"config": "main", "sweep": "sweep"}[other]
                raise DitError(
                    f"'{self.file}' is a {other}, not a {what}: python -m dit_jax.{program} --{other} {path}"
                )
            raise DitError(f"{self.name} has no function {function}: add {function}(arg=None)")
        try:
            inspect.signature(found).bind(*self._given)
        except TypeError:
            need = "takes no argument: drop" if self._given else "needs an argument: write"
            raise DitError(f"{self.name} {need} ':{self.arg or 'ARG'}' after .py") from None
        self._function: Callable[..., Any] = found

    def _import(self, examples: str) -> Any:
        if not self.file.is_file():
            names = [str(other) for other in sorted(self.file.parent.glob("*.py"))]
            where = f": give a path; those of the project are in {examples} of its repository"
            hint = did_you_mean(str(self.file), names, where)
            raise DitError(f"there is no {self.name}{hint}")
        spec = importlib.util.spec_from_file_location(
            f"dit_jax_{self.what}_{self.file.stem}", self.file
        )
        if spec is None or spec.loader is None:
            raise DitError(f"{self.name} is not a Python file: it must end with .py")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except SyntaxError as error:
            raise DitError(f"{self.name}, line {error.lineno}: {error.msg}") from error
        except (Exception, SystemExit) as error:
            raise DitError(f"{self.name}{self._line_of(error)}: {_describe(error)}") from error
        return module

    def call(self, finish: Callable[[Any], Any] = lambda result: result) -> Any:
        """What the function returns, after `finish`. Raises DitError: either fails; the message has the line."""
        try:
            return finish(self._function(*self._given))
        except DitError:
            raise
        except (Exception, SystemExit) as error:
            where = f"{self.what} '{self.path}'{self._line_of(error)}"
            raise DitError(f"{where}: {_describe(error)}") from error

    def _line_of(self, error: BaseException) -> str:
        """The last line of the file in the error's traceback, as ', line N'."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == self.file]
        return f", line {lines[-1]}" if lines else ""


def _describe(error: BaseException) -> str:
    message = str(error.args[0]) if error.args else ""
    # What a locked ConfigDict says of a key that it does not have, in the words of this package.
    if key := re.search(r'Key "(\w+)" does not exist', message):
        close = re.search(r'Did you mean "(\w+)"', message)
        return f"unknown config key '{key[1]}'" + (f": did you mean '{close[1]}'?" if close else "")
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"


def import_object(path: str, what: str) -> Any:
    """Imports what `package.module:NAME` names.

    Args:
        path: of a config, which is the user's own program. Paths in files of others are never imported.
        what: it is, for the message: "behaviour", "stage".

    Raises:
        DitError: the module is not found or is not valid Python, or has no such name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise DitError(
            f"cannot import the {what} {path!r}: {error}; its file must be in the current folder "
            "or in a folder of PYTHONPATH"
        ) from error
    except SyntaxError as error:
        raise DitError(f"cannot import the {what} {path!r}: {error}") from error
