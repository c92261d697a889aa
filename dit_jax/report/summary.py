"""What the evaluate stage left in a workdir, read and reduced to the numbers of `summary.json`."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_jax.data import labels
from dit_jax.errors import DitError
from dit_jax.evaluate.methods import EVALUATION_FORMAT
from dit_jax.report.statistics import (
    Estimate,
    bootstrap_mean,
    cluster_means,
    holm,
    paired_difference,
)
from dit_jax.runtime.artifacts import MANIFEST, PathLike, read_json, read_manifest, read_text

Row = dict[str, Any]
Json = dict[str, Any]

_REMEDY = "run the stage 'evaluate' again"
_REPAIR = "delete this file and run the same command again, with the stage 'evaluate'"
_ROW_TYPES: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "kind": str,
    "diff": (int, type(None)),
    "topic": str,
    "category": str,
    "name_tokens": int,
    "wording_seen": (bool, type(None)),  # null: the method asks no question
    "answer": str,
    "guess": str,
}
_KINDS = ("method", "control", "baseline")
_CATEGORIES = ("topic", "benign", "no_diff")
CROSS_ENTROPY_KEYS = ("matched", "shuffled", "noise", "none")
GATING_KEYS = ("right_code", "wrong_code", "no_code")
CURVE_KEYS = ("adapter_loss", "diff_loss")


@dataclass(frozen=True)
class Inputs:
    """The artifacts that a report is made from."""

    rows: list[Row]
    label_cross_entropy: dict[str, list[float]]
    gating: dict[str, list[float]]
    curves: dict[str, list[tuple[float, float]]]
    stages: dict[str, Json]
    config: Json
    versions: Json
    cost: Json  # device, bytes, and what each method cost; {} from an evaluation that did not measure it
    excluded: Json  # counts of held-out diffs: all, failed at the gate, left out
    transcripts: list[Row]  # what guessers read: method, diff, topic, guess, exchanges

    @property
    def answered(self) -> list[Row]:
        """Rows with an answer: a guesser that gave none left a gap, which counts nowhere."""
        return [row for row in self.rows if not row.get("gap")]


# ------------------------------------------------------------------ reading


def _read_rows(path: Path) -> list[Row]:
    """Rows of answers.jsonl, each checked against `_ROW_TYPES`."""
    lines = read_text(path, _REMEDY).splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            raise DitError(
                f"'{path}' line {number} is truncated or not JSON: delete it and {_REMEDY}"
            ) from None
        _check_row(row, f"'{path}' line {number}")
        rows.append(row)
    if not any(row["method"] == "dit" and row["category"] == "topic" for row in rows):
        raise DitError(f"'{path}' holds no answer of the method 'dit' on a topic: {_REMEDY}")
    return rows


def _read_transcripts(path: Path) -> list[Row]:
    """Rows of transcripts.jsonl; none where no method has a guesser."""
    rows = []
    lines = read_text(path, _REMEDY).splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            exchanges = [(str(question), str(answer)) for question, answer in row["exchanges"]]
            texts = {key: str(row[key]) for key in ("method", "topic", "guess")}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DitError(
                f"'{path}' line {number} is truncated or no transcript: delete it and {_REMEDY}"
            ) from None
        rows.append({**texts, "exchanges": exchanges})
    return rows


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise DitError(f"{where} is not a row of answers: {_REMEDY}")
    for key, kinds in _ROW_TYPES.items():
        if key not in row or not isinstance(row[key], kinds):
            raise DitError(f"{where} has no valid '{key}': {_REMEDY}")
    for key, allowed in (("kind", _KINDS), ("category", _CATEGORIES)):
        if row[key] not in allowed:
            raise DitError(f"{where} has {key} {row[key]!r}, not one of {allowed}: {_REMEDY}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_table(
    path: Path, keys: Iterable[str], is_item: Callable[[Any], bool], least: int = 1
) -> Json:
    """A JSON object that has a list of at least `least` valid items under each of `keys`."""
    table = read_json(path, _REMEDY)
    for key in keys:
        items = table.get(key) if isinstance(table, dict) else None
        if not isinstance(items, list) or len(items) < least or not all(map(is_item, items)):
            raise DitError(f"'{path}' has no valid numbers under '{key}': {_REMEDY}")
    return {key: table[key] for key in keys}


def _read_object(path: Path, remedy: str = _REMEDY) -> Json:
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise DitError(f"'{path}' is not a JSON object: delete it and {remedy}")
    return value


def _read_optional(path: Path) -> Json:
    return _read_object(path) if path.exists() else {}


def _read_stages(folder: Path) -> dict[str, Json]:
    """Records of the finished stages, in order of their end; the report's own is not among them."""
    records = {}
    for file in sorted(folder.glob("*.json")):
        record = _read_object(file, f"run the stage '{file.stem}' again")
        if not _is_number(record.get("seconds")):
            raise DitError(f"'{file}' has no valid 'seconds': run the stage '{file.stem}' again")
        if file.stem != "report":
            records[file.stem] = record
    if not records:
        raise DitError(f"'{folder}' holds no record of a finished stage: {_REMEDY}")
    order = ("diffs", "train", "evaluate")
    rank = {stage: order.index(stage) if stage in order else len(order) for stage in records}
    return dict(sorted(records.items(), key=lambda item: rank[item[0]]))


def read_inputs(workdir: PathLike) -> Inputs:
    """Reads everything that the report needs.

    Raises:
      DitError: a file is missing, truncated or not what it should be; the message names it.
    """
    workdir = Path(workdir)
    folder = workdir / "evaluate"
    if (folder / MANIFEST).exists():  # the stage writes it; one from elsewhere may have none
        read_manifest(folder, EVALUATION_FORMAT, remedy=_REMEDY, file_remedy=_REPAIR)

    def is_point(item: Any) -> bool:
        return isinstance(item, list) and len(item) == 2 and all(_is_number(x) for x in item)

    return Inputs(
        rows=_read_rows(folder / "answers.jsonl"),
        label_cross_entropy=_read_table(
            folder / "label_cross_entropy.json", CROSS_ENTROPY_KEYS, _is_number
        ),
        # Behaviours without a trigger have nothing to gate.
        gating=_read_table(folder / "gating.json", GATING_KEYS, _is_number, least=0),
        # A stage that ran elsewhere leaves an empty curve.
        curves=_read_table(folder / "curves.json", CURVE_KEYS, is_point, least=0),
        stages=_read_stages(workdir / "stages"),
        config=_read_object(workdir / "config.json"),
        versions=_read_object(workdir / "versions.json"),
        cost=_read_optional(folder / "cost.json"),
        excluded=_read_optional(folder / "excluded.json"),
        transcripts=_read_transcripts(folder / "transcripts.jsonl"),
    )


# ------------------------------------------------------------------ reducing


def seen(row: Row) -> bool:
    """Whether the adapter was trained on this wording, or the method asks no question at all."""
    return row["wording_seen"] is not False


def _unit(row: Row, index: int) -> object:
    """What counts as one draw of chance: the diff, or without a diff the single answer."""
    return row["diff"] if row["diff"] is not None else f"answer {index}"


def _per_unit(rows: list[Row], score: Callable[[Row], float]) -> dict[Any, float]:
    units = [_unit(row, index) for index, row in enumerate(rows)]
    return dict(cluster_means([float(score(row)) for row in rows], units))


def _rate(rows: list[Row], score: Callable[[Row], float]) -> Estimate:
    return bootstrap_mean(list(_per_unit(rows, score).values()))


def _match(row: Row) -> float:
    return float(labels.exact_match(row["guess"], row["topic"]))


def _score(rows: list[Row]) -> Json | None:
    """Exact match and token F1 with their intervals, n diffs; None without rows."""
    if not rows:
        return None
    match = _rate(rows, _match)
    f1 = _rate(rows, lambda row: labels.token_f1(row["guess"], row["topic"]))
    return {
        "exact_match": match.mean,
        "ci_low": match.low,
        "ci_high": match.high,
        "token_f1": f1.mean,
        "token_f1_low": f1.low,
        "token_f1_high": f1.high,
        "n": match.n,
    }


def _by_name_length(rows: list[Row]) -> Json:
    return {
        "one_token": _score([row for row in rows if row["name_tokens"] == 1]),
        "multi_token": _score([row for row in rows if row["name_tokens"] > 1]),
        "all": _score(rows),
    }


def _interval(estimate: Estimate) -> Json:
    return {
        "mean": estimate.mean,
        "ci_low": estimate.low,
        "ci_high": estimate.high,
        "n": estimate.n,
    }


def _none_rates(rows: list[Row]) -> dict[str, Json | None]:
    """How often each category is called `none`; None where a category was not asked."""

    def rate(category: str) -> Json | None:
        chosen = [row for row in rows if row["category"] == category]
        if not chosen:
            return None
        return _interval(_rate(chosen, lambda row: labels.called_none(row["guess"])))

    return {
        "benign_called_none": rate("benign"),
        "no_diff_called_none": rate("no_diff"),
        "topics_called_none": rate("topic"),
    }


def _by_wording(rows: list[Row]) -> list[Json]:
    """Score of each wording of the question, those of the training first."""
    wordings = {str(row.get("wording")): seen(row) for row in rows}
    ordered = sorted(wordings, key=lambda wording: not wordings[wording])
    return [
        {
            "wording": wording,
            "seen": wordings[wording],
            **(_score([row for row in rows if str(row.get("wording")) == wording]) or {}),
        }
        for wording in ordered
    ]


def paired_with_dit(scores: Mapping[str, Mapping[Any, float]], span: float) -> Json:
    """The score of `dit` minus that of every other method, over the diffs that both have.

    Args:
      scores: by method, the score of each diff.
      span: the largest difference that two scores can have.

    Returns:
      By method: difference, interval, two-sided p, p adjusted by Holm's method over all of them, n.
    """
    dit = scores["dit"]
    pairs = {
        name: paired_difference(dit, other, span=span)
        for name, other in scores.items()
        if name != "dit" and any(diff in dit for diff in other)
    }
    adjusted = holm([pair.p_value for pair in pairs.values()])
    return {
        name: {
            "difference": pair.mean,
            "ci_low": pair.low,
            "ci_high": pair.high,
            "p_value": pair.p_value,
            "p_holm": p_holm,
            "n": pair.n,
        }
        for (name, pair), p_holm in zip(pairs.items(), adjusted, strict=True)
    }


def _guesser(rows: list[Row]) -> Json:
    names = sorted({str(row["guesser"]) for row in rows if row.get("guesser")})
    return {"guesser": ", ".join(names)} if names else {}


def _left_out(inputs: Inputs) -> Json:
    """Held-out diffs that were excluded, and answers that are missing, by method and reason."""
    gaps: Json = {}
    for row in inputs.rows:
        if reason := row.get("gap"):
            counts = gaps.setdefault(row["method"], {})
            counts[str(reason)] = counts.get(str(reason), 0) + 1
    return {"diffs": dict(inputs.excluded), "answers": gaps}


def _means(table: Mapping[str, list[float]], *, rate: bool) -> dict[str, Json]:
    return {key: _interval(bootstrap_mean(values, rate=rate)) for key, values in table.items()}


def _only_means(intervals: Mapping[str, Json | None]) -> Json:
    return {key: None if value is None else value["mean"] for key, value in intervals.items()}


def summarise(inputs: Inputs) -> Json:
    """The content of `summary.json`, but for the report's own seconds.

    `methods.<name>` is over all held-out names, asked in the wordings of the training; rates and
    cross-entropies are plain means, with their intervals under `<key>_intervals`.
    """
    topics = [row for row in inputs.answered if row["category"] == "topic"]
    dit = [row for row in inputs.answered if row["method"] == "dit"]
    dit_topics = [row for row in topics if row["method"] == "dit"]

    by_method: dict[str, list[Row]] = {}
    for row in filter(seen, topics):
        by_method.setdefault(row["method"], []).append(row)
    if "dit" not in by_method:
        raise DitError(f"no answer of 'dit' to a wording of the training: {_REMEDY}")

    methods = {}
    for name, rows in by_method.items():
        lengths = _by_name_length(rows)
        methods[name] = {
            "kind": rows[0]["kind"],
            **lengths.pop("all"),
            "by_name_length": lengths,
            **_guesser(rows),
        }

    none = {
        "seen": _none_rates([row for row in dit if seen(row)]),
        "unseen": _none_rates([row for row in dit if not seen(row)]),
    }
    cross_entropy = _means(inputs.label_cross_entropy, rate=False)
    gating = _means({key: rates for key, rates in inputs.gating.items() if rates}, rate=True)
    memory: list[Any] = [record.get("peak_memory_bytes") for record in inputs.stages.values()]
    seconds = {stage: float(record["seconds"]) for stage, record in inputs.stages.items()}
    return {
        "methods": methods,
        "differences_from_dit": paired_with_dit(
            {name: _per_unit(rows, _match) for name, rows in by_method.items()}, span=1.0
        ),
        "dit_by_name_length": _by_name_length(by_method["dit"]),
        "dit_by_wording": {
            "seen": _score(by_method["dit"]),
            "unseen": _score([row for row in dit_topics if not seen(row)]),
        },
        "dit_by_each_wording": _by_wording(dit_topics),
        "none": _only_means(none["seen"]),
        "none_intervals": none,
        "label_cross_entropy": _only_means(cross_entropy),
        "label_cross_entropy_intervals": cross_entropy,
        "gating": _only_means(gating),
        "gating_intervals": gating,
        "seconds": seconds,
        "seconds_total": sum(seconds.values()),
        "cost": inputs.cost,
        "excluded": _left_out(inputs),
        "peak_memory_bytes": max((int(m) for m in memory if _is_number(m)), default=None),
        "config": inputs.config,
        "versions": inputs.versions,
    }
