"""What the stage `evaluate` does, in units that jobs can share: one method, one block of the held-out diffs.

Finished units wait in WORKDIR/evaluate_parts until all are there. A killed run goes on with the next one.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from dit_jax.config.loading import to_dict
from dit_jax.data.labels import answer_text
from dit_jax.errors import DitError
from dit_jax.evaluate import baselines, methods
from dit_jax.evaluate.capability import measure_capability
from dit_jax.evaluate.evaluate_keys import EVALUATE, GRADING_KEYS
from dit_jax.evaluate.faithfulness import strongest_layers, without_words
from dit_jax.evaluate.setting import CostMeter, Setting
from dit_jax.formats.files import file_inside
from dit_jax.formats.json_shape import Shape, each, fits, is_any_number, is_number
from dit_jax.runtime import artifacts
from dit_jax.runtime.parts import read_part, write_part

PARTS = "evaluate_parts"
LABELS, CAPABILITY = "label_cross_entropy", "capability"
# They change which units there are and what becomes of them, but no unit.
_OF_NO_UNIT = ("methods", "part", *(key.name for key in GRADING_KEYS))


@dataclasses.dataclass(frozen=True)
class Unit:
    """One method, or LABELS or CAPABILITY, on the number-th of `blocks` blocks of the held-out diffs."""

    name: str
    number: int
    blocks: int

    def file(self, workdir: pathlib.Path) -> pathlib.Path:
        return workdir / PARTS / f"{self.name}-{self.number}-of-{self.blocks}.json"


def list_units(names: Iterable[str], topics: int, config: Any) -> list[Unit]:
    """All units of an evaluation, in the order of its files.

    Args:
        names: of the methods.
        topics: how many held-out topics there are.
    """
    blocks = -(-topics // (EVALUATE.get(config, "diffs_at_once") or topics))
    units = [Unit(name, i, blocks) for name in (*names, LABELS) for i in range(blocks)]
    return [*units, Unit(CAPABILITY, 0, 1)]


def ask_unit(unit: Unit, setting: Setting) -> dict[str, Any]:
    """{"rows", "transcripts", "values", "cost"} of a unit."""
    s = dataclasses.replace(
        setting, number=unit.number, blocks=unit.blocks, meter=CostMeter(), transcripts=[]
    )
    rows, values = [], {}
    with s.meter.measure(unit.name):
        if unit.name == LABELS:
            values = _label_cross_entropy(s)
        elif unit.name == CAPABILITY:
            values = dict(measure_capability(s))
        else:
            rows = methods.find_method(unit.name)(s)
    cost = s.meter.costs[unit.name]
    return {"rows": rows, "transcripts": s.transcripts, "values": values, "cost": cost}


def _label_cross_entropy(s: Setting) -> dict[str, list[float]]:
    """By what the model gets in place of each topic's diff: the cross-entropy of the topic's label."""
    prefix, given = EVALUATE.get(s.config, "answer_prefix"), s.topics.given
    targets = [
        prefix + answer_text(s.topics.label(i), row["evidence"] if s.config.list_evidence else [])
        for i, row in enumerate(s.topics.rows)
    ]
    instead = {
        "matched": given,
        "shuffled": s.shuffled,
        "noise": s.noise,
        "none": given.nothing(),
        "layers": strongest_layers(given),
        "words": without_words(s.model, given, list(map(s.model.chat.text_ids, targets))),
    }
    return {
        name: baselines.label_cross_entropy(s.model, s.adapter, one, s.seen[0], targets)
        for name, one in instead.items()
    }


def merge(units: Iterable[Unit], found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """{"rows", "transcripts", "values" and "costs" by name} of all units."""
    merged: dict[str, Any] = {"rows": [], "transcripts": [], "values": {}, "costs": {}}
    for unit, one in zip(units, found, strict=True):
        merged["rows"] += one["rows"]
        merged["transcripts"] += one["transcripts"]
        costs = merged["costs"].setdefault(unit.name, {})
        for name, count in one["cost"].items():
            costs[name] = round(costs.get(name, 0) + count, 3)
        values = merged["values"].setdefault(unit.name, one["values"])
        if unit.number:
            for name, more in one["values"].items():
                values[name] = values.get(name, []) + more
    return merged


# ------------------------------------------------------------------ files


def made_from(workdir: pathlib.Path, config: Any, seed: int) -> str:
    """A digest of all that decides what units find: diffs, adapter, config and seed."""
    values = to_dict(config)
    told = {key: value for key, value in values.items() if key not in _OF_NO_UNIT}
    texts = [key.name for key in EVALUATE.keys if key.file and told.get(key.name)]
    folders = [workdir / "diffs", workdir / (EVALUATE.get(config, "adapter") or "adapter")]
    facts = [
        told,
        seed,
        *map(artifacts.content_digest, folders),
        *(artifacts.digest_file(told[name]) for name in texts),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_unit(workdir: pathlib.Path, unit: Unit, made: str, found: dict[str, Any]) -> None:
    write_part(unit.file(workdir), {"made_from": made, **found})


def read_unit(workdir: pathlib.Path, unit: Unit, made: str) -> dict[str, Any] | None:
    """What `write_unit` wrote; None if there is nothing, or it is damaged or was made from something else."""
    found = read_part(unit.file(workdir))
    return found if found is not None and _is_unit(found, unit.name, made) else None


def _is_unit(found: dict[str, Any], name: str, made: str) -> bool:
    """Whether it is a unit of this name. Its rows are checked where they are read, in reports."""
    shape: dict[str, Shape] = {
        "made_from": lambda x: x == made,
        "rows": [{"method": lambda x: x == name}],
        "transcripts": [{}],
        "values": {LABELS: each([is_any_number]), CAPABILITY: {}}.get(name, lambda x: x == {}),
        "cost": each(is_number),
    }
    return fits(found, shape)


def copy_units(source: pathlib.Path, workdir: pathlib.Path, made: str) -> int:
    """Copies the finished units of one workdir that another lacks; returns how many.

    Raises:
        DitError: a unit is damaged, lies elsewhere, or was made from another config, other diffs or another adapter.
    """
    copied = 0
    for file in sorted((source / PARTS).glob("*.json")):
        found = read_part(file_inside(source / PARTS, file.name))
        target = workdir / PARTS / file.name
        if found is None:
            raise DitError(f"'{file}' is damaged: delete it and run that job again")
        if not _is_unit(found, file.name.partition("-")[0], made):
            raise DitError(
                f"'{file}' was not made from the diffs and the adapter in '{workdir}': run that job beside them"
            )
        if read_part(target) is None:
            write_part(target, found)
            copied += 1
    return copied
