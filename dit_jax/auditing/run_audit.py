"""An audit: diffs one after the other into OUT/parts, which a killed audit keeps, then the tables and the page."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.auditing import calibration, side_by_side, weights
from dit_jax.auditing.battery import interview, noise_of, score
from dit_jax.auditing.records import is_record
from dit_jax.auditing.settings import Settings
from dit_jax.auditing.targets import Target, in_batches, reading_order
from dit_jax.deltas.factors import changes_nothing
from dit_jax.diff_batches import even_batch, together
from dit_jax.errors import DitError
from dit_jax.evaluate import readers
from dit_jax.evaluate.faithfulness import kept_layers, strongest_layers, without_words
from dit_jax.formats import budgets
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import nbytes
from dit_jax.report import audit_page
from dit_jax.runtime import artifacts, digests
from dit_jax.runtime.outgoing import csv_text, json_text
from dit_jax.runtime.parts import part_of, read_part, write_part
from dit_jax.runtime.progress import Progress

Json = dict[str, Any]
SETTINGS, PARTS = "audit.json", "parts"
NEAREST = 3  # other diffs shown of each
OVERFLOWS = (
    "its weights or logits overflow, so its answers mean nothing: check its scale (lora_alpha)"
)
SAID = ("split", "found_in", "base_model_name_or_path", "svd", "aligned")  # of a diff's metadata


def audit(
    settings: Settings,
    targets: Sequence[Target],
    out: Path,
    job: str = "",
    tell: Callable[[int], object] = lambda done: None,
) -> list[Json] | None:
    """Asks all diffs that have no part yet, and writes the page if no other job is still at work.

    Args:
        job: "i/n", see `part_of`: of the blocks of diffs that share batches only every n-th.
        tell: called with the number of finished diffs after each block.

    Returns:
        The records of all diffs in order; None while parts of other jobs are missing.

    Raises:
        DitError: OUT holds an audit with other settings, or loses what is written there.
    """
    _begin(settings, out)
    ordered = [targets[i] for i in reading_order(targets)]
    size = even_batch(len(ordered), settings.diffs_at_once)
    # Blocks of the whole list: whichever job asks one, and whatever of it is done, its batches are the same.
    starts = range(0, len(ordered), size)
    mine = [(starts[i], ordered[starts[i] :][:size]) for i in part_of(job, len(starts))]
    asked = functools.cache(
        lambda: readers.ask_base(settings.model, settings.prompts, settings.battery.max_new_tokens)
    )
    with Progress("audit", sum(len(block) for _, block in mine)) as progress:
        for first, block in mine:
            found = {target: read_record(out, target) for target in block}
            # What could not be read may be there again.
            missing = [
                target
                for target, one in found.items()
                if one is None or ("error" in one and target.read is not None)
            ]
            if missing:
                for target, record, sketch in examine(settings, asked, block, missing, first, size):
                    _write_record(out, target, record, sketch)
            progress.advance(len(block))
            tell(progress.done)
    records = {target: read_record(out, target) for target in targets}
    if any(records[target] is None for _, block in mine for target in block):
        raise DitError(
            f"parts of this audit have vanished from '{out / PARTS}': run the same command again"
        )
    whole = [record for record in records.values() if record]
    return finish(settings, targets, whole, out) if len(whole) == len(targets) else None


def _begin(settings: Settings, out: Path) -> None:
    told, file = settings.to_json(), out / SETTINGS
    if not file.exists():
        if (out / PARTS).exists():
            raise DitError(
                f"'{file}' is missing, so nothing says what the diffs in '{out / PARTS}' were asked: choose another "
                "--out, or delete it"
            )
        artifacts.write_json(file, told)
        return
    before = artifacts.read_json(file, "choose another --out")
    if not isinstance(before, dict):
        raise DitError(f"'{file}' holds no settings of an audit: choose another --out")
    # Through JSON, as it was written; versions may change between two calls.
    now = json.loads(json.dumps(told))
    if before.keys() != now.keys() or before["format"] != now["format"]:
        raise DitError(
            f"'{out}' holds an audit that another version of dit_jax began, whose records differ: go on with that "
            "version, choose another --out, or delete it"
        )
    other = [key for key in now if key != "versions" and before.get(key) != now[key]]
    if other:
        raise DitError(
            f"'{out}' holds an audit with another {' and '.join(other)}: choose another --out, or delete it"
        )


# ------------------------------------------------------------------ one diff after the other


def examine(
    settings: Settings,
    asked: Callable[[], readers.Everyday],
    block: Sequence[Target],
    missing: Sequence[Target],
    first: int,
    size: int,
) -> Iterator[tuple[Target, Json, weights.Sketch]]:
    """(target, record, sketch) of the missing diffs of a block, as soon as they are known.

    The LoRAs of a block share a batch, whatever their ranks and modules. Dense diffs, each as large as the model, go
    one by one.

    Args:
        asked: gives what the base answers.
        first: number of the block's first diff, which with the seed gives the random numbers.
        size: diffs of a whole block. A block with fewer LoRAs runs the same programs.
    """
    for batch in in_batches(block, settings.model, len(block)):
        target, diff = batch[0]
        if isinstance(diff, DitError):
            yield target, {"name": target.name, "error": str(diff)}, {}
        elif any(target in missing for target, _ in batch):
            found = _examine_batch(settings, asked(), batch, first, size)
            yield from (one for one in found if one[0] in missing)
        first += len(batch)


def _examine_batch(
    settings: Settings,
    asked: readers.Everyday,
    batch: Sequence[tuple[Target, Any]],
    first: int,
    size: int,
) -> Iterator[tuple[Target, Json, weights.Sketch]]:
    model, adapter, battery, most = (
        settings.model, settings.adapter, settings.battery, settings.batch_size
    )  # fmt: skip
    count = len(batch)
    deltas = [diff.delta for _, diff in batch]
    alone = together(deltas)
    most_bytes = budgets.padded_bytes(nbytes(deltas))
    if alone.stacked is not None and nbytes(alone.stacked) * size <= count * most_bytes:
        # The first ones again fill up the rows.
        deltas = [deltas[i % count] for i in range(max(size, count))]
    given = together(deltas)
    noise = noise_of(deltas, battery.seed + first)
    rows = even_batch(len(given) * battery.answers, most)
    readings = interview(model, given, adapter, battery, rows, first=first)
    noises = interview(model, noise, adapter, battery, rows, first=first)
    chosen = [reading.scored for reading in readings]
    with_noise = score(model, noise, adapter, chosen, most)
    others = [(i + 1) % count for i in range(len(given))]
    with_other = score(model, given.reordered(others), adapter, chosen, most)
    layers = score(model, strongest_layers(given), adapter, chosen, most)
    ends = model.chat.eos_ids
    written = [[t for t in one.tokens[one.start :] if t not in ends] for one in chosen]
    words = score(model, without_words(model, given, written), adapter, chosen, most)
    changes = side_by_side.compare(model, given, asked, most, count)
    triggers = side_by_side.find_triggers(
        model, alone, settings.tried, battery.max_new_tokens, most
    )
    words_of = {
        name: [change["words"] for change in changes]
        if name == "mined_words"
        else find(model, given, asked, most)
        for name, find in readers.READERS.items()
    }
    told = readers.tell(
        model, [own[i] for i in range(count) for own in words_of.values()], battery.questions[0],
        even_batch(len(given) * len(words_of), most),
        max_new_tokens=battery.max_new_tokens, forbid_repeats=battery.forbid_repeats,
    )  # fmt: skip
    for i, (target, diff) in enumerate(batch):
        facts = weights.weight_facts(diff.delta)
        if not math.isfinite(readings[i].logprob + changes[i]["kl"] + facts["norm"]):
            yield target, {"name": target.name, "error": OVERFLOWS}, {}
            continue
        record: Json = {
            "name": target.name,
            "path": target.path,
            "number": target.number,
            "label": diff.label,
            "digest": digests.digest_tree(diff.delta),
            "said": {key: diff.metadata[key] for key in SAID if diff.metadata.get(key)},
            "notes": list(diff.metadata.get("notes", ())),
            "zero": changes_nothing(diff.delta),
            **facts,
            "unusual": weights.unusual(weights.spectrum(diff.delta), settings.benign),
            "kl": changes[i]["kl"],
            "prompts": changes[i]["prompts"],
            "trigger": triggers[i],
            "readers": {
                name: {"words": one.words, "says": one.name}
                for name, one in zip(words_of, told[i * len(words_of) :], strict=False)
            },
            "reading": readings[i].to_json(),
            "faithful": {
                "kept": kept_layers(model.config.num_hidden_layers),
                "layers": layers[i],
                "words": words[i],
            },
            "noise": {**noises[i].to_json(), "same_answer": with_noise[i]},
            "other": (
                {"name": batch[others[i]][0].name, "same_answer": with_other[i]}
                if count > 1
                else None
            ),
        }
        yield target, record, weights.sketch(diff.delta)


# ------------------------------------------------------------------ parts


def _part(out: Path, target: Target) -> Path:
    return out / PARTS / f"{target.key}.json"


def read_record(out: Path, target: Target) -> Json | None:
    """The record of a diff that was audited before; None if it was not, or the part is damaged."""
    record = (read_part(_part(out, target)) or {}).get("record")
    return record if is_record(record) and record["name"] == target.name else None


def _write_record(out: Path, target: Target, record: Json, sketch: weights.Sketch) -> None:
    from safetensors.numpy import save_file

    file, stored = _part(out, target), _stored_sketch(out, target)
    with artifacts.atomic_file(stored) as temporary:
        save_file(sketch, temporary)
    write_part(file, {"record": _finite(record), "sketch": artifacts.digest_file(stored)})


def _stored_sketch(out: Path, target: Target) -> Path:
    return _part(out, target).with_suffix(".safetensors")


def _finite(value: Any) -> Any:
    """The value with null for numbers that overflowed, which JSON of others cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sketch(out: Path, target: Target, config: DecoderConfig) -> weights.Sketch | None:
    """None if it is damaged: it only tells which diffs are alike."""
    found, stored = read_part(_part(out, target)), _stored_sketch(out, target)
    if not found or not stored.is_file() or artifacts.digest_file(stored) != found.get("sketch"):
        return None
    shapes = weights.sketch_shapes(config)
    with contextlib.suppress(DitError):
        file = SafetensorsFile(stored)
        if all(file.shape(x) == shapes.get(x) and file.dtype(x) == np.float32 for x in file.names):
            sketch = {name: file.read(name) for name in file.names}
            if all(np.isfinite(one).all() for one in sketch.values()):
                return sketch
    return None


# ------------------------------------------------------------------ what it leaves


def finish(
    settings: Settings, targets: Sequence[Target], records: Sequence[Json], out: Path
) -> list[Json]:
    """Adds what needs all diffs, and writes audit.jsonl, audit.csv and audit.html."""
    config = settings.model.config
    alike = weights.cosines([_sketch(out, target, config) for target in targets])
    known, rows = settings.calibration, []
    for i, record in enumerate(records):
        row = dict(record)
        if "error" not in row:
            order = [
                j for j in np.argsort(-np.abs(alike[i]), kind="stable") if j != i and alike[i, j]
            ]
            row["nearest"] = [
                {
                    "name": records[j]["name"],
                    "number": int(j) + 1,
                    "cosine": round(float(alike[i, j]), 3),
                }
                for j in order[:NEAREST]
            ]
            reading = row["reading"]
            row["score"] = known and calibration.probabilities(
                known, reading["evidence"], reading["features"]
            )
        row["verdict"] = audit_page.verdict(row, known)
        rows.append(row)
    told = settings.to_json()
    shared = {
        key: told[key]
        for key in ("base", "base_digest", "dtype", "adapter", "adapter_digest", "versions")
    }
    lines = [json_text({**row, **shared}) + "\n" for row in rows]
    artifacts.write_text(out / "audit.jsonl", "".join(lines))
    artifacts.write_text(
        out / "audit.csv", csv_text(map(audit_page.csv_row, rows), audit_page.COLUMNS)
    )
    artifacts.write_text(out / "audit.html", audit_page.page(rows, told, known))
    return rows
