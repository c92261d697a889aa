"""The file of a calibration, beside an adapter or in its folder: it may come with the adapter, from a stranger."""

import os
from pathlib import Path
from typing import Any

from dit_jax.asking import is_temperature
from dit_jax.auditing.calibration import BINS, FORMAT, RATES, SMALLEST_STD, VERSION
from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.formats.files import file_inside, has_file, read_json_object, user_path
from dit_jax.formats.json_shape import fits, is_count, is_number, is_switch, is_text, maybe
from dit_jax.runtime import artifacts

INSIDE = "calibration.json"  # the name in the folder of an adapter that was pushed


def file_beside(adapter: str) -> Path:
    """Where the calibration of an adapter lies: ADAPTER.calibration.json; of a hub id, in the current folder."""
    path = user_path(adapter)
    if not path.exists():  # a folder of its owner's name would hide the id
        return Path(
            f"{adapter.rpartition('://')[2].strip('/').replace('/', '--')}.calibration.json"
        )
    path = Path(os.path.abspath(path))  # "." has no name
    return path.with_name(f"{path.name}.calibration.json") if path.name else path / INSIDE


def of_adapter(adapter: str, folder: Path, digest: str) -> dict[str, Any] | None:
    """The calibration beside an adapter, or else the one in its folder, which came with it; None if there is none.

    Args:
        adapter: its path or hub id. folder: where it is on this machine.

    Raises:
        DitError: see `read`.
    """
    inside = has_file(folder, INSIDE)
    return read(file_beside(adapter), digest) or (
        read(file_inside(folder, INSIDE), digest) if inside else None
    )


def write(path: Path, calibration: dict[str, Any]) -> None:
    artifacts.write_json(path, calibration)


def read(path: Path, adapter_digest: str) -> dict[str, Any] | None:
    """The calibration at a path; None if there is none. Raises DitError: it is malformed, or of another adapter."""
    if not path.is_file():
        return None
    found = read_json_object(path)
    remedy = "delete it, and run 'python -m dit_jax.calibrate' again"
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise DitError(f"'{path}' is no calibration that this program reads: {remedy}")
    if found.get("adapter") != adapter_digest:
        raise DitError(f"'{path}' was made for another adapter: {remedy}")
    if not fits(found, _SHAPE):
        raise DitError(f"'{path}' is damaged: {remedy}")
    return found


# What a calibration must hold, since it may come with an adapter.
_MOST = 10_000  # samples and tokens that a file may ask for


def _is_number(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e30


def _is_few(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _MOST


def is_question(value: Any) -> bool:
    """Whether a stranger's file may have it asked."""
    return is_text(value) and len(value) <= budgets.MAX_QUESTION


_BATTERY: dict[str, Any] = {
    "questions": [is_question],
    "samples": _is_few,
    "temperature": lambda x: _is_number(x) and is_temperature(x),
    "max_new_tokens": _is_few,
    "forbid_repeats": is_switch,
    "list_evidence": is_switch,
    "seed": is_count,
    "contrast": maybe(lambda x: _is_number(x) and 0 <= x <= 1),
}


def _is_battery(value: Any) -> bool:
    """Keys of a version that had fewer may be missing, but not the questions."""
    if not isinstance(value, dict) or not value.get("questions") or value.keys() - _BATTERY.keys():
        return False
    if not fits(value, {key: _BATTERY[key] for key in value}):
        return False
    if value.get("contrast") is not None and value.get("temperature"):
        return False
    answers = len(value["questions"]) * value.get("samples", 1)
    return bool(answers * value.get("max_new_tokens", 1) <= budgets.MAX_BATTERY_TOKENS)


def check_battery(told: dict[str, Any]) -> None:
    """Raises DitError for a battery that no calibration may hold, since reading it would refuse it."""
    if not _is_battery(told):
        raise DitError(
            f"a calibration asks for at most {budgets.MAX_BATTERY_TOKENS} tokens of answers about a diff, and its "
            f"questions have at most {budgets.MAX_QUESTION} characters: ask less"
        )


_RATE = {"mean": _is_number, "ci_low": _is_number, "ci_high": _is_number, "n": is_count}
_PAIR = (_is_number, _is_number)
_THRESHOLD = {"wanted": _is_number, "above": _is_number, "false_positives": _RATE, "found": _RATE}
_BIN = {"from": _is_number, "to": _is_number, "said": _is_number, **_RATE}
_MAP = {
    "mean": _PAIR,
    "std": lambda x: fits(x, _PAIR) and min(x) >= SMALLEST_STD,
    "weights": _PAIR,
    "bias": _is_number,
    "n": is_count,
    "positive": is_count,
    "auroc": maybe(_RATE),
    "thresholds": lambda x: fits(x, [maybe(_THRESHOLD)]) and len(x) <= len(RATES),
    "reliability": lambda x: fits(x, [_BIN]) and len(x) < len(BINS),
    "calibration_error": _is_number,
}
_SHAPE = {
    "battery": _is_battery,
    "system": maybe(is_question),
    "source": is_text,
    "controls": is_switch,
    "hidden": _MAP,
    "right": _MAP,
}
