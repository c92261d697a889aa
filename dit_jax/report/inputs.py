"""What the evaluate stage left in a workdir, read and checked."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError
from dit_jax.evaluate.method_table import EVALUATION_FORMAT, GROUPS
from dit_jax.formats.files import short
from dit_jax.formats.json_parser import parse_json
from dit_jax.formats.json_shape import (
    Shape,
    each,
    fits,
    is_any_number,
    is_number,
    is_text,
    maybe,
    optional,
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
_TEXTS = ("question", "trigger", "variant", "topic_category", "wording")  # which a row may lack
_CHOICES = {"kind": tuple(GROUPS), "category": ("topic", "benign", "no_diff")}
_CROSS_ENTROPIES = ("matched", "shuffled", "noise", "none")
_SINCE = ("layers", "words")  # which older runs do not have
_GATING = ("right_code", "wrong_code", "no_code")
_CURVES = ("adapter_loss", "diff_loss")


_METHOD_COST = {
    "seconds": is_number,
    "answers": is_number,
    "prompt_tokens": is_number,
    "tokens": is_number,
}
# Files that an evaluation may lack, or leave empty.
_OPTIONAL: dict[str, Shape] = {
    "capability": {
        "facts": is_number,
        "base_right": is_number,
        "kept": lambda x: fits(x, [is_number]) and len(x) > 0,
    },
    "cost": optional(
        device={"kind": is_text, "count": is_number},
        bytes=each(is_number),
        parameters=each(is_number),
        methods=each(_METHOD_COST),
    ),
    "excluded": optional(
        held_out=maybe(is_number),
        failed_gate=maybe(is_number),
        excluded=maybe(is_number),
        gate_kl=maybe(is_number),
    ),
    "gating_by_variant": each(each([is_number])),
}
_CONFIG = optional(data={}, diffs=optional(gate=each(is_any_number)), train={}, evaluate={})


@dataclass(frozen=True)
class Inputs:
    """The artifacts that a report is made from."""

    rows: list[Row]
    label_cross_entropy: dict[str, list[float]]
    gating: dict[str, list[float]]
    gating_by_variant: Json
    curves: dict[str, list[tuple[float, float]]]
    stages: dict[str, Json]
    config: Json
    versions: Json
    capability: Json  # see evaluate.capability; {} where no facts were asked
    cost: Json  # device, bytes, and what each method cost; {} from an evaluation that did not measure it
    excluded: Json  # counts of held-out diffs: all, failed at the gate, left out
    transcripts: list[Row]  # what guessers read: method, diff, topic, guess, exchanges

    @property
    def answered(self) -> list[Row]:
        """Rows with an answer: where a guesser gave none there is a gap, which counts nowhere."""
        return [row for row in self.rows if not row.get("gap")]


def variants(rows: Iterable[Row]) -> list[str]:
    """The variants of the held-out diffs that rows are about, in the order of the data."""
    return list(dict.fromkeys(variant(row) for row in rows if row["category"] == "topic"))


def variant(row: Row) -> str:
    """Which of its topic's diffs a row is about; "" where a topic has one."""
    return str(row.get("variant") or "")


def seen(row: Row) -> bool:
    """Whether the adapter was trained on this wording, or the method asks no question at all."""
    return row["wording_seen"] is not False


def read_inputs(workdir: PathLike) -> Inputs:
    """Reads everything that the report needs.

    Raises:
        DitError: a file is missing, truncated or not what it should be; the message names it.
    """
    workdir = Path(workdir)
    folder = workdir / "evaluate"
    if (folder / MANIFEST).exists():  # the stage writes it; one from elsewhere may have none
        read_manifest(folder, EVALUATION_FORMAT, remedy=_REMEDY, file_remedy=_REPAIR)
    answers, transcripts = folder / "answers.jsonl", folder / "transcripts.jsonl"
    rows = _lines(answers, "not JSON", _answer)
    if not any(row["method"] == "dit" and row["category"] == "topic" for row in rows):
        raise DitError(f"'{answers}' holds no answer of the method 'dit' on a topic: {_REMEDY}")
    may_lack = {
        name: _fitting(file, shape) if (file := folder / f"{name}.json").exists() else {}
        for name, shape in _OPTIONAL.items()
    }
    entropies = folder / "label_cross_entropy.json"
    more = [name for name in _SINCE if name in _object(entropies)]
    return Inputs(
        rows=rows,
        label_cross_entropy=_table(entropies, (*_CROSS_ENTROPIES, *more)),
        # Behaviours without a trigger have nothing to gate, and a stage that ran elsewhere leaves an empty curve.
        gating=_table(folder / "gating.json", _GATING, least=0),
        curves=_table(folder / "curves.json", _CURVES, _is_point, least=0),
        stages=_stages(workdir / "stages"),
        config=_fitting(workdir / "config.json", _CONFIG),
        versions=_object(workdir / "versions.json"),
        # Without a guesser there are no transcripts.
        transcripts=_lines(transcripts, "no transcript", _transcript)
        if transcripts.exists()
        else [],
        **may_lack,
    )


def _lines(path: Path, otherwise: str, check: Callable[[Any, str], Row]) -> list[Row]:
    """The checked rows of a file of JSON lines; `otherwise`: what a line is that is none."""
    rows = []
    for number, line in enumerate(read_text(path, _REMEDY).splitlines(), start=1):
        where = f"'{path}' line {number}"
        try:
            rows.append(check(parse_json(line), where))
        except (ValueError, KeyError, TypeError):
            raise DitError(
                f"{where} is truncated or {otherwise}: delete it and {_REMEDY}"
            ) from None
    return rows


def _answer(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DitError(f"{where} is not a row of answers: {_REMEDY}")
    for key, kinds in _ROW_TYPES.items():
        if key not in row or not isinstance(row[key], kinds):
            raise DitError(f"{where} has no valid '{key}': {_REMEDY}")
    for key in _TEXTS:
        if not isinstance(row.get(key), str | None):
            raise DitError(f"{where} has no valid '{key}': {_REMEDY}")
    if "words" in row and not fits(row["words"], [is_text]):
        raise DitError(f"{where} has no valid 'words': {_REMEDY}")
    for key, allowed in _CHOICES.items():
        if row[key] not in allowed:
            raise DitError(f"{where} has {key} {short(row[key])}, not one of {allowed}: {_REMEDY}")
    return row


def _transcript(row: Any, where: str) -> Row:
    exchanges = [(str(question), str(answer)) for question, answer in row["exchanges"]]
    texts = {key: str(row[key]) for key in ("method", "topic", "guess")}
    return {**texts, "exchanges": exchanges}


def _is_point(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(map(is_number, item))


def _table(
    path: Path, keys: Iterable[str], is_item: Callable[[Any], bool] = is_number, least: int = 1
) -> Json:
    """A JSON object that has a list of at least `least` valid items under each of `keys`."""
    table = read_json(path, _REMEDY)
    for key in keys:
        items = table.get(key) if isinstance(table, dict) else None
        if not isinstance(items, list) or len(items) < least or not all(map(is_item, items)):
            raise DitError(f"'{path}' has no valid numbers under '{key}': {_REMEDY}")
    return {key: table[key] for key in keys}


def _object(path: Path, remedy: str = _REMEDY) -> Json:
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise DitError(f"'{path}' is not a JSON object: delete it and {remedy}")
    return value


def _fitting(path: Path, shape: Shape) -> Json:
    value = _object(path)
    if value and not fits(value, shape):
        raise DitError(f"'{path}' has no valid values: delete it and {_REMEDY}")
    return value


def _stages(folder: Path) -> dict[str, Json]:
    """Records of the finished stages, in their order; the report's own is not among them."""
    records = {}
    for file in folder.glob("*.json"):
        record = _object(file, f"run the stage '{file.stem}' again")
        if not is_number(record.get("seconds")):
            raise DitError(f"'{file}' has no valid 'seconds': run the stage '{file.stem}' again")
        records[file.stem] = record
    records.pop("report", None)
    if not records:
        raise DitError(f"'{folder}' holds no record of a finished stage: {_REMEDY}")
    order = ("diffs", "train", "evaluate")
    names = sorted(records, key=lambda name: (order.index(name) if name in order else 3, name))
    return {name: records[name] for name in names}
