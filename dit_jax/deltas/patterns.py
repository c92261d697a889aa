"""Regular expressions from untrusted adapter configs, in bounded time: the library `regex` with a timeout."""

import re
import time
from typing import Any

import regex

from dit_jax.errors import DitError
from dit_jax.formats.files import short

MAX_PATTERN = 10_000
# The library writes repeats out when it compiles them, at up to 1 kB a character.
MAX_WRITTEN_OUT = 100_000
SECONDS = 3.0

_TOKEN = re.compile(
    r"\\(?P<escape>.)|\(\?(?P<group>P[<=]|<[=!]|.?)|\{(?P<count>\d+,?\d*|,\d+)\}|(?P<brace>\{)|.",
    re.DOTALL,
)
_GROUPS = (":", "=", "!", "<=", "<!", "P<")


class Budget:
    """CPU seconds that the patterns of a file may take together, over all the texts they are matched with."""

    def __init__(self, seconds: float = SECONDS):
        self.left = seconds


class Pattern:
    """A compiled pattern with `match` and `fullmatch` as in `re`, which return bool.

    Args:
        budget: shared with the other patterns of a file. None: one of its own.

    Raises:
        DitError: not a regular expression, or one with flags, back references, or groups other than those that `re`
            and `regex` share; when matching, a pattern that needs too much time.
    """

    def __init__(self, pattern: str, budget: Budget | None = None):
        self.pattern, self._budget = pattern, budget or Budget()
        if len(pattern) > MAX_PATTERN:
            raise DitError(f"the pattern {short(pattern)} has {len(pattern)} characters: too long")
        self._check()
        self._compiled = self._timed(lambda: regex.compile(pattern))

    def match(self, text: str) -> bool:
        """Whether the pattern matches at the start of `text`."""
        return (
            self._timed(lambda: self._compiled.match(text, timeout=self._budget.left)) is not None
        )

    def fullmatch(self, text: str) -> bool:
        """Whether the pattern matches all of `text`."""
        timed = self._timed(lambda: self._compiled.fullmatch(text, timeout=self._budget.left))
        return timed is not None

    def _refuse(self, what: str) -> DitError:
        return DitError(f"the pattern {short(self.pattern)} uses {what}, which is not supported")

    def _timed(self, run: Any) -> Any:
        start = time.process_time()
        try:
            result = run()
            self._budget.left -= time.process_time() - start
        except (regex.error, RecursionError, OverflowError):
            raise DitError(
                f"{short(self.pattern)} is not a valid regular expression: fix it"
            ) from None
        except TimeoutError:
            self._budget.left = 0
        if self._budget.left <= 0:
            raise self._refuse("too many alternatives and repeats")
        return result

    def _check(self) -> None:
        """Refuses what `regex` reads otherwise than `re`, and what would be large once compiled."""
        written_out = len(self.pattern)
        for token in _TOKEN.finditer(self.pattern):
            escape, group = token["escape"], token["group"]
            if group == "P=" or (escape and escape in "123456789"):
                raise self._refuse("groupref")
            if group is not None and group not in _GROUPS:
                raise self._refuse(f"flags or a group of the kind '(?{group}'")
            if token["brace"]:
                raise self._refuse("a brace that is no repeat")
            if token["count"]:
                written_out *= max(1, *(int(n[:9] or 0) for n in token["count"].split(",")))
        if written_out > MAX_WRITTEN_OUT:
            raise self._refuse("too many alternatives and repeats")
