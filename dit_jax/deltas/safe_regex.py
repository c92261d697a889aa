"""Regular expressions from untrusted files, matched in bounded time.

Adapter configs choose modules by regular expressions, and Python's own matcher needs exponential
time for some of them. This one walks the parsed pattern over sets of positions: for every part and
start, the ends it can reach, remembered. It only says whether there is a match, which needs no
groups.
"""

import re
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from dit_jax.errors import DitError
from dit_jax.formats.files import short

MAX_PATTERN = 10_000
MAX_STEPS = 2_000_000

_CATEGORIES = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
}
_NEGATED = {
    op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT,
    op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE,
    op.CATEGORY_NOT_WORD: op.CATEGORY_WORD,
}


class Budget:
    """Steps that patterns may take together, over all the texts they are matched with."""

    def __init__(self, steps: int = MAX_STEPS):
        self.left = steps


class SafeRegex:
    """A compiled pattern with `match` and `fullmatch` as in `re`, which return bool.

    Args:
      budget: shared with the other patterns of a file. None: one of its own.

    Raises:
      DitError: not a regular expression, or one with back references, atomic groups or flags;
        when matching, a pattern that needs too many steps.
    """

    def __init__(self, pattern: str, budget: Budget | None = None):
        self.pattern = pattern
        if len(pattern) > MAX_PATTERN:
            raise DitError(f"the pattern {short(pattern)} has {len(pattern)} characters: too long")
        try:
            parsed = _parser.parse(pattern)
        except (re.error, RecursionError, OverflowError):
            raise DitError(f"{short(pattern)} is not a valid regular expression: fix it") from None
        if parsed.state.flags & ~re.UNICODE:
            raise self._refuse("flags")
        self._root = list(parsed)
        self._budget = budget or Budget()

    def match(self, text: str) -> bool:
        """Whether the pattern matches at the start of `text`."""
        return bool(self._run(text))

    def fullmatch(self, text: str) -> bool:
        """Whether the pattern matches all of `text`."""
        return len(text) in self._run(text)

    def _refuse(self, what: str) -> DitError:
        return DitError(f"the pattern {short(self.pattern)} uses {what}, which is not supported")

    def _run(self, text: str) -> frozenset[int]:
        self._text = text
        self._known: dict[tuple[int, int], frozenset[int]] = {}
        try:
            return self._sequence(self._root, frozenset([0]))
        except RecursionError:
            raise self._refuse("too deeply nested groups") from None

    def _sequence(self, items: Any, starts: frozenset[int]) -> frozenset[int]:
        for item in items:
            if not starts:
                break
            starts = frozenset().union(*(self._ends(item, start) for start in starts))
        return starts

    def _ends(self, item: Any, start: int) -> frozenset[int]:
        kind, value = item
        self._budget.left -= 1 + (len(value) if kind is op.IN else 0)
        if self._budget.left < 0:
            raise self._refuse("too many alternatives and repeats")
        key = id(item), start
        if key not in self._known:
            self._known[key] = self._compute(item, start)
        return self._known[key]

    def _compute(self, item: Any, start: int) -> frozenset[int]:
        kind, value = item
        here, nothing = frozenset([start]), frozenset[int]()
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return frozenset([start + 1]) if self._accepts(kind, value, start) else nothing
        if kind is op.AT:
            return here if self._at(value, start) else nothing
        if kind is op.BRANCH:
            return nothing.union(*(self._sequence(branch, here) for branch in value[1]))
        if kind is op.SUBPATTERN:
            if value[1] or value[2]:
                raise self._refuse("flags")
            return self._sequence(value[3], here)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeat(value, here)
        if kind in (op.ASSERT, op.ASSERT_NOT):
            begin = start
            if value[0] != 1:  # looking behind
                least, most = value[1].getwidth()
                if least != most:
                    raise self._refuse("look-behind of a variable width")
                begin -= least
            found = begin >= 0 and bool(self._sequence(value[1], frozenset([begin])))
            return here if found == (kind is op.ASSERT) else nothing
        raise self._refuse(str(kind).lower().replace("_", " "))

    def _accepts(self, kind: Any, value: Any, start: int) -> bool:
        if start >= len(self._text):
            return False
        char = self._text[start]
        if kind is op.ANY:
            return char != "\n"
        if kind is not op.IN:
            return (ord(char) == value) == (kind is op.LITERAL)
        negate = value[0][0] is op.NEGATE
        return negate != any(self._in_set(char, *entry) for entry in value[negate:])

    def _in_set(self, char: str, kind: Any, value: Any) -> bool:
        if kind is op.LITERAL:
            return ord(char) == value
        if kind is op.RANGE:
            return bool(value[0] <= ord(char) <= value[1])
        if kind is op.CATEGORY:
            if value in _NEGATED:
                return not _CATEGORIES[_NEGATED[value]](char)
            return _CATEGORIES[value](char)
        raise self._refuse(str(kind).lower())

    def _at(self, value: Any, start: int) -> bool:
        if value in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return start == 0
        if value in (op.AT_END, op.AT_END_STRING):
            return start == len(self._text)
        word = _CATEGORIES[op.CATEGORY_WORD]
        sides = [0 <= i < len(self._text) and word(self._text[i]) for i in (start - 1, start)]
        return (sides[0] != sides[1]) == (value is op.AT_BOUNDARY)

    def _repeat(self, value: Any, starts: frozenset[int]) -> frozenset[int]:
        least, most, body = value
        reached = starts if least == 0 else frozenset[int]()
        count = 0
        while starts and count < most:
            count += 1
            following = self._sequence(body, starts)
            if count >= least:
                if following <= reached:
                    break
                reached |= following
            elif following == starts:  # all later rounds are the same
                count = least - 1
            starts = following
        return reached
