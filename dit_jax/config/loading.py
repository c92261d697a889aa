"""Configs: load a file with `get_config`, lock it, override keys, compare two, save one.

A config is a Python file with a function `get_config(arg=None) -> ml_collections.ConfigDict`.
"""

import ast
import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict, config_dict

from dit_jax.config.user_code import ProgramFile
from dit_jax.errors import DitError, did_you_mean
from dit_jax.runtime import artifacts

_ABSENT = object()


# ------------------------------------------------------------------ loading


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes the overrides out of a command line.

    Args:
        argv: arguments, among them `--config.key=value` or `--config.key value`.

    Returns:
        The other arguments, for argparse, and the overrides as `key=value`, for `load_config`.

    Raises:
        DitError: an override has no value.
    """
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        override = argument.removeprefix("--config.")
        if "=" not in override:
            value = next(arguments, None)
            if value is None:
                raise DitError(f"'{argument}' has no value: write {argument}=VALUE")
            override = f"{override}={value}"
        overrides.append(override)
    return rest, overrides


def load_config(
    path: str,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    optional: Mapping[str, Any] = MappingProxyType({}),
) -> ConfigDict:
    """Loads a config file, applies overrides, and locks the result.

    Args:
        path: `configs/x.py` or `configs/x.py:arg`; arg goes to `get_config`.
        overrides: values by dotted key, or strings `key=value` that are read as the type of the value
            that they replace. Tuples are written `(1,2)` or, for strings, `a,b`.
        optional: by dotted key the value that an absent one stands for. An override may set it; of a section whose
            keys are names of their own, such as a grader's options, the value is {}, and an override may add to it.

    Returns:
        A locked ConfigDict.

    Raises:
        DitError: the file is missing or fails, has no get_config or does not accept the argument; a
            key is unknown; a value has the wrong type; a required value is not set.
    """
    program = ProgramFile(path, "config", "get_config", "configs/")
    config = program.call()
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise DitError(f"get_config of '{program.file}' returns {kind}, not a ConfigDict")
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _override(config, key, value, optional, parse=False)
    else:
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals:
                raise DitError(f"config override '{override}' has no value: write {key}=VALUE")
            _override(config, key.strip(), text, optional, parse=True)
    flatten(config)  # finds required values that nobody set, on which lock() would stumble
    return config.lock()


# ------------------------------------------------------------------ overrides


def _override(
    config: ConfigDict, key: str, value: Any, optional: Mapping[str, Any], *, parse: bool
) -> None:
    *sections, last = key.split(".")
    node: Any = config
    mine = any(key.startswith(f"{name}.") for name, absent in optional.items() if absent == {})
    for section in sections:
        if mine and isinstance(node, ConfigDict) and section not in node:
            with node.unlocked():
                node[section] = ConfigDict()
        node = node.get(section) if isinstance(node, ConfigDict) else None
    if mine and isinstance(node, ConfigDict) and last not in node:
        with node.unlocked():
            node[last] = _literal(value) if parse else value
        return
    if isinstance(node, ConfigDict) and last not in node and optional.get(key, {}) != {}:
        with node.unlocked():
            node[last] = optional[key]
    if not isinstance(node, ConfigDict) or last not in node:
        raise DitError(_unknown_key(config, key, optional))
    kind = _kind(node, last)
    if isinstance(value, Mapping) or issubclass(kind, ConfigDict):
        if not issubclass(kind, ConfigDict) or not isinstance(value, Mapping):
            raise DitError(f"config key '{key}' is a section: set a key in it, '{key}.NAME'")
        for name, inner in value.items():
            _override(config, f"{key}.{name}", inner, optional, parse=False)
        return
    if parse:
        value = _parse(key, value, kind, node[last] if kind in (tuple, list) else ())
    # ConfigDict would take a bool for an int, since bool is a subclass of int.
    if isinstance(value, bool) and kind in (int, float):
        raise DitError(f"config key '{key}' must be {kind.__name__}, not bool: {value!r}")
    try:
        node[last] = value
    except (TypeError, ValueError):
        raise DitError(
            f"config key '{key}' must be {kind.__name__}, not {type(value).__name__}: {value!r}"
        ) from None


def _kind(node: ConfigDict, name: str) -> type:
    try:
        return node.get_type(name)
    except config_dict.RequiredValueError:  # a placeholder without a value knows its type
        return node.get_ref(name).get_type()


def _unknown_key(config: ConfigDict, key: str, optional: Mapping[str, Any]) -> str:
    known = [name for name, _ in _leaves(config)]
    absent = [name for name in optional if name.rpartition(".")[0] in config]
    suggestion = did_you_mean(key, [*known, *absent])
    if not suggestion:  # perhaps the right name in the wrong section
        last = key.rpartition(".")[2]
        same = [name for name in known if name.rpartition(".")[2] == last]
        more = f" and {len(known) - 12} more" if len(known) > 12 else ""
        listed = f": known keys are {', '.join(known[:12])}{more}"
        suggestion = f": did you mean '{same[0]}'?" if same else listed
    return f"unknown config key '{key}'{suggestion}"


def _parse(key: str, text: str, kind: type, current: Sequence[Any]) -> Any:
    """Reads the text of an override as a value of the type that it replaces."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        # Without a type to go by, the value so far is None.
        return kind(_parse_sequence(text, current)) if kind in (tuple, list) else _literal(text)
    except (ValueError, KeyError):
        raise DitError(
            f"config key '{key}' must be {kind.__name__}: cannot read '{text}'"
        ) from None


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
        str(value)  # whole numbers may have more digits than Python shows
        return value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # {[1]: 2}, -----1
        return text


def _parse_sequence(text: str, current: Sequence[Any]) -> list[Any]:
    value = _literal(text)
    if value is text:  # `a,b` without quotes
        value = [part.strip() for part in text.split(",") if part.strip()]
    if not isinstance(value, tuple | list):
        value = (value,)
    if not all(isinstance(item, type(current[0]) if current else object) for item in value):
        raise ValueError(text)
    return list(value)


# ------------------------------------------------------------------ comparing


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values with their dotted keys; an empty section counts as `{}`, unset as _ABSENT."""
    for name in sorted(config.keys()):
        key = prefix + name
        try:
            value = config[name]
        except config_dict.RequiredValueError:
            value = _ABSENT
        if isinstance(value, ConfigDict) and len(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, {} if isinstance(value, ConfigDict) else value


def _plain(key: str, value: Any) -> Any:
    """A config value as JSON has it (tuples become lists)."""
    if value is _ABSENT:
        raise DitError(f"config key '{key}' is not set: add --config.{key}=VALUE")
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise DitError(
            f"config key '{key}' holds {type(value).__name__}: use numbers, strings, tuples or None"
        ) from None


def flatten(config: ConfigDict) -> dict[str, Any]:
    """The config's values by dotted key, as JSON values.

    Raises:
        DitError: a required value is not set, or a value has no JSON form.
    """
    return {key: _plain(key, value) for key, value in _leaves(config)}


def config_diff(old: ConfigDict, new: ConfigDict, ignore: Iterable[str] = ()) -> list[str]:
    """The differences of two configs, one readable line each: `train.steps: 400 -> 800`.

    Args:
        old: what was.
        new: what is asked for.
        ignore: keys or patterns (`stages`, `*log_every`) to leave out; a section stands for its keys.
    """
    before, after = flatten(old), flatten(new)
    patterns = [pattern for name in ignore for pattern in (name, f"{name}.*")]
    lines = []
    for key in sorted({*before, *after}):
        a, b = before.get(key, _ABSENT), after.get(key, _ABSENT)
        # repr also tells 1 from True and 1.0, and holds NaN equal to itself.
        same = repr(a) == repr(b)
        if not same and not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
            lines.append(f"{key}: {_show(a)} -> {_show(b)}")
    return lines


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


# ------------------------------------------------------------------ on disk


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as nested plain JSON values, for manifests. Raises DitError like `flatten`."""
    tree: dict[str, Any] = {}
    for key, value in flatten(config).items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return tree


def save_config(config: ConfigDict, path: artifacts.PathLike) -> None:
    """Writes a config as JSON, atomically. Raises DitError like `flatten` and `write_json`."""
    artifacts.write_json(path, to_dict(config))


def load_saved(path: artifacts.PathLike) -> ConfigDict:
    """Reads a config that `save_config` wrote, locked; sequences come back as tuples.

    Raises:
        DitError: the file is missing, truncated or not a config.
    """
    value = artifacts.read_json(path, "use a new --workdir")
    try:
        if isinstance(value, dict):
            return ConfigDict(_tuples(value)).lock()
    except (ValueError, AttributeError):  # a key with a dot, or __class__
        pass
    raise DitError(f"'{path}' is not a config: use a new --workdir")


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value
