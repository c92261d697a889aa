"""Shows users' mistakes in Inspect as one line, without a traceback."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import pydantic
from inspect_ai.model import Model
from rich.markup import escape

from dit_jax.errors import DitError
from dit_jax.formats.files import short

try:  # private: without it a traceback stands above the line
    from inspect_ai._util.error import PrerequisiteError
except ImportError:
    PrerequisiteError = Exception  # type: ignore[assignment,misc]

try:  # private: without it only the first sample shows that the model lacks an adapter
    from inspect_ai.model._model import active_model
except ImportError:

    def active_model() -> Model | None:
        """The model is not known here."""
        return None


P = ParamSpec("P")
T = TypeVar("T")


class InspectError(DitError, PrerequisiteError):
    """A `DitError` that Inspect's command line prints without a traceback."""

    def __init__(self, message: str):
        DitError.__init__(self, message)
        # Inspect prints `message` with rich, for which brackets are markup.
        self.message = escape(f"error: {message}")


def one_line(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, which raises every `DitError` as an `InspectError`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except DitError as error:
            raise InspectError(str(error)) from None

    return wrapped


def checked(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes a task, solver or scorer refuse arguments of other names and types than it says in one line.

    Args:
        what: its arguments, such as "task argument -T", which Inspect reads as YAML.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        valid = pydantic.validate_call(function)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return valid(*args, **kwargs)
            except pydantic.ValidationError as error:
                wrong = error.errors()[0]
                missing = wrong["type"] == "missing_argument"
                said = "" if missing else f" is {short(wrong['input'])}"
                raise InspectError(f"{what} {wrong['loc'][0]}{said}: {wrong['msg']}") from None

        return one_line(wrapped)

    return decorate
