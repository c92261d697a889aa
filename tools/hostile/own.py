"""Stores, adapters, audits and calibrations, in formats of our own."""

import csv
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dit_jax
from dit_jax.auditing import calibration, calibration_file, run_audit
from dit_jax.auditing.battery import Battery
from dit_jax.auditing.targets import Target
from dit_jax.auditing.weights import sketch
from dit_jax.deltas import store
from dit_jax.deltas.adapter_file import export_adapter
from dit_jax.runtime import artifacts
from tools.hostile.common import CONFIG, factors_of, small_lora, small_model, values_of


def make_store(folder: Path) -> None:
    stacked = jax.tree.map(lambda *x: np.stack(x), small_lora(1), small_lora(2))
    rows = [{"topic": f"topic {i}", "trigger": str(i), "split": "test"} for i in (0, 1)]
    store.write_shard(folder, 0, stacked, rows)
    store.publish(folder, 1, base=small_model().digest())


def read_store(folder: Path) -> Any:
    opened = dit_jax.load_diff(folder, small_model(), 1)
    return factors_of(opened.delta), opened.label, opened.trigger


def stored_truth(folder: Path) -> Any:
    from safetensors.numpy import load_file

    leaves = load_file(folder / "shards" / "00000.safetensors")
    with open(folder / "index.csv", newline="") as file:
        row = list(csv.DictReader(file))[1]
    layers = (
        x for name, stacked in leaves.items() if not name.endswith("scale") for x in stacked[1]
    )
    return values_of(layers), row["topic"], row["trigger"]


def make_adapter(folder: Path) -> None:
    export_adapter(folder, small_lora(), base=small_model().digest())


def seal_folder(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, facts in manifest["files"].items():
        facts |= {
            "bytes": (folder / name).stat().st_size,
            "sha256": artifacts.digest_file(folder / name),
        }
    path.write_text(json.dumps(manifest))


def make_calibration(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    facts = {"adapter": "a", "battery": Battery(("q",)).to_json(), "system": None, "source": "s"}
    pairs = [(float(rng.random()), float(rng.normal())) for _ in range(60)]
    known = [
        calibration.Known(pair, pair, bool(i % 2), bool(i % 4 == 1), i)
        for i, pair in enumerate(pairs)
    ]
    calibration_file.write(folder / "x.json", calibration.calibrate(known, facts))


def read_calibration(folder: Path) -> Any:
    found = calibration_file.read(folder / "x.json", "a")
    assert found is not None
    said = calibration.probabilities(found, (0.5, 3.0), (0.5, 3.0))
    if not all(0 <= x <= 1 for x in said.values() if x is not None):
        raise AssertionError("no probability")
    return found


_TARGET = Target("a diff", "no file")
_RECORD = {"name": "a diff", "error": "no file"}


def make_audit(folder: Path) -> None:
    folder.mkdir()
    run_audit._write_record(folder, _TARGET, _RECORD, sketch(small_lora()))


def read_audit(folder: Path) -> Any:
    """A part that is damaged is asked again."""
    record, seen = (
        run_audit.read_record(folder, _TARGET),
        run_audit._sketch(folder, _TARGET, CONFIG),
    )
    return record or _RECORD, values_of((seen or sketch(small_lora())).values())
