"""Declarations of config keys: each key once, beside the code that reads it.

A declaration gives the key's type, bounds, choices and default. The checks of a config, the defaults of keys that it
leaves out, and docs/config.md come from it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from dit_jax.errors import DitError, did_you_mean

REQUIRED: Any = object()  # in place of a default
TEXTS = tuple[str, ...]
MAX_WHOLE = 2**31 - 2**10  # of 32 bits, with room for a seed + i


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a section.

    name: within its section. about: one line for docs/config.md.
    kind: int, float, bool, str, TEXTS, dict (a section with names of its own), or another tuple, which `check` checks.
    default: what an absent key means; REQUIRED: it must be there, and if it is a text, it must not be empty.
    least, most: of a number; least of TEXTS: how many there are.
    choices: what a text, or each of several, may be.
    check: (value, "config key 'x.y'") -> None; raises DitError for a value of the right type that cannot be.
    needed: (section) -> whether a required key must be there.
    free: whether it changes no result, so that two runs in one workdir may differ in it.
    file: whether it is the path of a text file. Two runs in one workdir must then agree in its text, not in its place.
    """

    name: str
    kind: Any
    about: str
    default: Any = REQUIRED
    least: int = 0
    most: float = math.inf
    choices: Iterable[str] = ()
    check: Callable[[Any, str], None] = lambda value, key: None
    needed: Callable[[Any], bool] = lambda section: True
    free: bool = False
    file: bool = False

    def check_value(self, value: Any, key: str) -> None:
        """Raises DitError where a value is not what the declaration says. key: "config key 'x.y'"."""
        if isinstance(value, ConfigDict | dict) and self.kind is not dict:
            raise DitError(f"{key} must be one value, and is a section")
        if not self._is_of_kind(value):
            raise DitError(f"{key} must be {self.describe()}, not {value!r}")
        if self.kind is int and value >= MAX_WHOLE:
            raise DitError(f"{key} must be a whole number below {MAX_WHOLE}, not {value!r}")
        known = tuple(self.choices)
        for name in value if self.kind == TEXTS else (value,):
            if known and name not in known:
                hint = did_you_mean(name, known, f": choose from {', '.join(known)}")
                raise DitError(f"{key}: unknown {name!r}{hint}")
        self.check(value, key)

    def _is_of_kind(self, value: Any) -> bool:
        if self.kind in (int, float):
            number = isinstance(value, self.kind | int) and not isinstance(value, bool)
            return number and self.least <= value <= self.most and value < math.inf
        if self.kind is str:
            return isinstance(value, str) and bool(value.strip() or self.default == "")
        if self.kind == TEXTS:
            several = isinstance(value, list | tuple) and len(value) >= self.least
            return several and all(isinstance(text, str) for text in value)
        if self.kind in (bool, dict):
            return isinstance(value, bool if self.kind is bool else ConfigDict | dict)
        return True  # a tuple of numbers, which `check` looks at

    def describe(self) -> str:
        """What a value must be, for messages and docs/config.md."""
        names = {
            int: f"a whole number from {self.least} up",
            float: f"a number from {self.least} {'up' if self.most == math.inf else f'to {self.most}'}",
            bool: "True or False",
            str: "text",
            TEXTS: "a tuple of one text or more" if self.least else "a tuple of texts",
            dict: "a section",
            tuple[int, int]: "two whole numbers",
            tuple[float, float]: "two numbers",
        }
        return names[self.kind]


@dataclasses.dataclass(frozen=True)
class Section:
    """The keys that one part of the program reads.

    name: of the section in a config; "": the top of the config.
    takes_others: (section) -> whether it may hold keys that are not declared here.
    """

    name: str
    keys: tuple[Key, ...]
    takes_others: Callable[[Any], bool] = lambda section: False

    def dotted(self, name: str) -> str:
        """A key as messages and overrides write it: `train.steps`."""
        return f"{self.name}.{name}" if self.name else name

    def get(self, values: Any, name: str) -> Any:
        """The value of a key, or its default where `values`, the section of a config, does not hold it.

        Raises:
            DitError: it is required and absent.
        """
        (key,) = (key for key in self.keys if key.name == name)
        if name in values:
            return values[name]
        if key.default is REQUIRED:
            raise _missing(self.dotted(name))
        return key.default

    def values(self, config: Any) -> Any:
        """The section of a config, empty where it has none. Raises DitError: one value in its place."""
        values = config.get(self.name, {}) if self.name else config
        if not isinstance(values, ConfigDict | dict):
            raise DitError(f"config key '{self.name}' must be a section, not {values!r}")
        return values

    def check(self, config: Any) -> None:
        """Raises DitError for the first key that is unknown, or whose value is not what its declaration says."""
        values, names = self.values(config), [key.name for key in self.keys]
        for name in () if self.takes_others(values) else values:
            if name not in names:
                known = f": keys of '{self.name}' are {', '.join(names)}"
                hint = did_you_mean(name, names, known)
                raise DitError(f"config key '{self.dotted(name)}' is unknown{hint}")
        for key in self.keys:
            if key.name in values:
                key.check_value(values[key.name], f"config key '{self.dotted(key.name)}'")

    def check_needed(self, config: Any, names: Iterable[str] | None = None) -> None:
        """Raises DitError for the first required key that is absent. names: the keys to look at; None: all."""
        values = self.values(config)
        for key in self.keys:
            asked = (names is None or key.name in names) and key.default is REQUIRED
            if asked and key.name not in values and key.needed(values):
                there = not self.name or self.name in config
                raise _missing(self.dotted(key.name) if there else self.name)


def _missing(key: str) -> DitError:
    return DitError(f"the config has no key '{key}', which is needed: add it, see docs/config.md")


def check_profile(steps: Any, key: str) -> None:
    """Raises DitError unless `steps` are the first step to trace and the one after the last."""
    match steps:
        case [int(first), int(last)] if 0 <= first <= last:
            return
    name = key.removeprefix("config key ").strip("'")
    raise DitError(
        f"{key} must be two whole numbers, the first traced and the one after the last, not {steps!r}: write "
        f"{name}=10,13"
    )
