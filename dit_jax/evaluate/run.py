"""The stage `evaluate`: methods, controls and untrained baselines on diffs that no training saw."""

import functools
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.api import Model, check_base, load_adapter
from dit_jax.deltas.store import DiffStore, failed
from dit_jax.errors import DitError
from dit_jax.evaluate import methods
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.method_table import EVALUATION_FORMAT
from dit_jax.evaluate.questions import subject_of
from dit_jax.evaluate.setting import Setting, read_held_out
from dit_jax.evaluate.units import (
    CAPABILITY,
    LABELS,
    PARTS,
    ask_unit,
    list_units,
    made_from,
    merge,
    read_unit,
    write_unit,
)
from dit_jax.formats.files import short
from dit_jax.models.delta_trees import nbytes
from dit_jax.organisms.gate import CONDITIONS
from dit_jax.runtime import artifacts, processes, stage_records
from dit_jax.runtime.os_errors import explain_os_errors
from dit_jax.runtime.parts import part_of
from dit_jax.runtime.progress import Progress

TOO_FEW_TOPICS = "evaluation needs two held-out topics or more (each is another's shuffled control)"


def evaluate_run(model: Model, workdir: pathlib.Path, config: Any, seed: int) -> dict[str, Any]:
    """Writes WORKDIR/evaluate/: answers.jsonl, transcripts.jsonl and the numbers that the report is made of.

    Args:
        config: the `evaluate` section of the config (docs/methods.md lists its keys).

    Returns:
        Facts for the record of the stage: {"answers": n}.

    Raises:
        DitError: fewer than two held-out topics, an unknown method, or one that cannot work on these diffs.
    """
    # ---------------------------------------------------------------- inputs
    store = DiffStore(workdir / "diffs")
    check_base(store.manifest.get("base"), model, str(workdir / "diffs"))
    store.check_fits(store.indices(split="test"), model.config)
    # The config may name the adapter of another run, relative to this one.
    adapter = load_adapter(workdir / (EVALUATE.get(config, "adapter") or "adapter"), model)
    exclude = EVALUATE.get(config, "exclude_failed")
    column = EVALUATE.get(config, "label")
    topics = read_held_out(store, "topic", exclude, column)
    if len(topics) < 2:
        raise DitError(
            TOO_FEW_TOPICS
            + (" that passed the gate: see 'passed' in diffs/index.csv" if exclude else "")
            + ": raise data.test_topics and use a new --workdir"
        )
    run_config = workdir / "config.json"
    setting = Setting(
        model=model,
        store=store,
        all_topics=topics,
        all_benign=read_held_out(store, "benign", exclude, column),
        adapter=adapter,
        off=jax.tree.map(jnp.zeros_like, adapter),
        config=config,
        seed=seed,
        subject=subject_of(artifacts.read_json(run_config) if run_config.exists() else {}),
    )
    names = [method.name for method in methods.chosen_methods(config, store)]
    units = list_units(names, len(topics), config)
    mine = part_of(EVALUATE.get(config, "part"), len(units))
    if not mine:
        raise DitError(
            f"config key 'evaluate.part': the evaluation is {len(units)} units, of which '{config.part}' has none: "
            f"use at most {len(units)} parts, or lower evaluate.diffs_at_once"
        )

    # ---------------------------------------------------------------- answers
    made, answers = made_from(workdir, config, seed), 0
    with Progress("evaluate", len(mine)) as progress:
        for unit in (units[i] for i in mine):
            found = read_unit(workdir, unit, made)
            if not processes.agree(found is not None):
                found = ask_unit(unit, setting)
                processes.on_main(functools.partial(write_unit, workdir, unit, made, found))
            answers += len(found["rows"]) if found else 0
            progress.advance(note=unit.name)

    # ---------------------------------------------------------------- write
    cost = _cost(setting, workdir)  # on all processes: it asks the devices

    def write() -> bool:
        found = [read_unit(workdir, unit, made) for unit in units]
        complete = [one for one in found if one is not None]
        if len(complete) < len(units):
            return False
        merged = merge(units, complete)
        numbers = {**merged["values"], "cost": {**cost, "methods": merged["costs"]}}
        numbers = {name: numbers[name] for name in (LABELS, CAPABILITY, "cost")}
        _write(workdir, setting, merged["rows"], merged["transcripts"], numbers)
        with explain_os_errors("delete", workdir / PARTS):  # such as a link
            shutil.rmtree(workdir / PARTS)
        return True

    if not processes.on_main(write):
        processes.say(
            "note: other parts of the evaluation are missing: join them with dit_jax.gather"
        )
    return {"answers": answers}


def _cost(setting: Setting, workdir: pathlib.Path) -> dict[str, Any]:
    """The devices, bytes and parameters."""
    device, model, adapter = jax.devices()[0], setting.model, setting.adapter
    shards = (workdir / "diffs" / "shards").glob("*.safetensors")
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": model.mesh.size if model.mesh is not None else 1,
            "processes": jax.process_count(),
        },
        "bytes": {
            "base": nbytes(model.params),
            "adapter": nbytes(adapter),
            "diff": nbytes(setting.topics.given.read(0)),
            "all_diffs": sum(shard.stat().st_size for shard in shards),
        },
        "parameters": {
            "base": sum(x.size for x in jax.tree.leaves(model.params)),
            "adapter": sum(x.size for x in jax.tree.leaves(adapter)),
        },
    }


def _shares(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the gate measured of these diffs, by condition."""
    return {name: [_measured(row, name) for row in rows if row.get(name)] for name in CONDITIONS}


def _measured(row: dict[str, Any], name: str) -> float:
    """A number of the index of the diffs, which may be a stranger's. Raises DitError: it is none."""
    try:
        number = float(row[name])
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise DitError(
            f"the index of the diffs has {short(row[name])} in the column {name!r}, which is no number: run the stage "
            "'diffs' again"
        )
    return number


def _write(
    workdir: pathlib.Path,
    setting: Setting,
    rows: list[dict[str, Any]],
    transcripts: list[dict[str, Any]],
    numbers: dict[str, Any],
) -> None:
    folder, index = artifacts.make_dir(workdir / "evaluate"), setting.store.rows
    tested = [row for row in index if row["split"] == "test"]
    divergences = [_measured(row, "gate_kl") for row in tested if row.get("gate_kl")]
    gated = [row for row in index if row.get("category") == "topic"]
    stages = {name: stage_records.stage_done(workdir, name) or {} for name in ("diffs", "train")}
    files: dict[str, Any] = {
        "answers.jsonl": rows,
        "transcripts.jsonl": transcripts,
        **{f"{name}.json": content for name, content in numbers.items()},
        "excluded.json": {
            "held_out": len(tested),
            "failed_gate": sum(map(failed, tested)) if "passed" in tested[0] else None,
            "excluded": len(tested) - len({*setting.topics.indices, *setting.benign.indices}),
            "gate_kl": sum(divergences) / len(divergences) if divergences else None,
        },
        "gating.json": _shares(gated),
        "gating_by_variant.json": {
            kind: _shares([row for row in gated if row.get("variant", "") == kind])
            for kind in dict.fromkeys(row.get("variant", "") for row in gated)
        },
        "curves.json": {
            "diff_loss": stages["diffs"].get("loss_curve", []),
            "adapter_loss": stages["train"].get("loss_curve", []),
        },
    }
    for name, content in files.items():
        if name.endswith(".json"):
            artifacts.write_json(folder / name, content)
        elif content:  # no guesser, no transcripts
            artifacts.write_text(folder / name, "".join(json.dumps(x) + "\n" for x in content))
    artifacts.write_manifest(folder, EVALUATION_FORMAT)
