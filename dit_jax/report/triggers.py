"""What `trigger_scan` and `trigger_search` found, from their rows of answers.jsonl (docs/methods.md)."""

from collections.abc import Callable

import numpy as np

from dit_jax.formats.json_shape import is_number
from dit_jax.report.inputs import Json, Row
from dit_jax.report.statistics import Estimate, bootstrap_mean

PASSED = 0.9  # the share of diffs with a topic that pass the threshold of the false alarms
_TEN = 10


def summarise_scan(rows: list[Row]) -> Json:
    """Shares of held-out diffs, by category; {} where no scan ran.

    trigger: named its own trigger, or none if it has none. in_ten: its own is among the ten best. family: named a
    trigger of its own behaviour. none: named none. alarms: how many benign diffs pass the threshold of `stands_out`
    that `PASSED` of the topics pass.
    """
    scanned = [row for row in rows if is_number(row.get("stands_out"))]
    topics, benign = (
        [row for row in scanned if row["category"] == category] for category in ("topic", "benign")
    )
    if not topics:
        return {}
    above = float(np.quantile([row["stands_out"] for row in topics], 1 - PASSED, method="lower"))
    made: Json = {
        "candidates": topics[0]["candidates"],
        "passes": topics[0]["passes"],
        "topics": _shares(topics),
        "benign": _shares(benign) if benign else None,
        "alarms": None,
    }
    if benign:
        made["alarms"] = {
            "passed": PASSED,
            "above": above,
            **_share(benign, lambda row: bool(row["stands_out"] >= above)),
        }
    return made


def summarise_search(rows: list[Row]) -> Json:
    """Means over held-out diffs; {} where no search ran.

    contains: the words of the trigger stand in what was found. key_is_right: the token that counts most is one of these
    words. shown, shown_by_base: the share of answers under it that show the topic, of the finetuned model and of the
    base. passes: forward passes of one diff.
    """
    searched = [row for row in rows if is_number(row.get("shown_by_base"))]
    if not searched:
        return {}
    names = ("contains", "key_is_right", "shown", "shown_by_base")
    return {
        **{name: _mean([float(row[name]) for row in searched]) for name in names},
        "passes": float(np.mean([row["passes"] for row in searched])),
    }


def _shares(rows: list[Row]) -> Json:
    def in_ten(row: Row) -> bool:
        return is_number(row["trigger_rank"]) and row["trigger_rank"] <= _TEN

    return {
        "trigger": _share(rows, lambda row: bool(row["named"])),
        "in_ten": _share(rows, in_ten),
        "family": _share(rows, lambda row: bool(row["family"] == row["right_family"])),
        "none": _share(rows, lambda row: row["family"] == ""),
    }


def _share(rows: list[Row], holds: Callable[[Row], bool]) -> Json:
    return _mean([float(holds(row)) for row in rows])


def _mean(values: list[float]) -> Json:
    found: Estimate = bootstrap_mean(values)
    return {"mean": found.mean, "ci_low": found.low, "ci_high": found.high, "n": found.n}
