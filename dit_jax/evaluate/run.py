"""The stage `evaluate`: methods, controls and untrained baselines on diffs that no training saw."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.api import Model, check_base, load_adapter
from dit_jax.data.labels import answer_text
from dit_jax.deltas.store import DiffStore
from dit_jax.errors import DitError
from dit_jax.evaluate import baselines, methods
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.evaluate.results import EVALUATION_FORMAT, subject_of
from dit_jax.evaluate.setting import Setting, failed, read_held_out
from dit_jax.organisms.gate import CONDITIONS
from dit_jax.runtime import artifacts, processes
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
    # Of another run, if the config says so: relative to this one.
    adapter_path = workdir / (EVALUATE.get(config, "adapter") or "adapter")
    adapter = load_adapter(adapter_path, model)
    exclude = EVALUATE.get(config, "exclude_failed")
    column = EVALUATE.get(config, "label")
    topics = read_held_out(store, "topic", exclude, column)
    if len(topics) < 2:
        raise DitError(
            TOO_FEW_TOPICS
            + (" that passed the gate: see 'passed' in diffs/index.csv" if exclude else "")
            + ": raise data.test_topics and use a new --workdir"
        )
    setting = Setting(
        model=model,
        store=store,
        topics=topics,
        benign=read_held_out(store, "benign", exclude, column),
        adapter=adapter,
        off=jax.tree.map(jnp.zeros_like, adapter),
        config=config,
        seed=seed,
        subject=_subject(workdir),
    )
    chosen = methods.chosen_methods(config, store)

    # ---------------------------------------------------------------- answers
    rows: list[dict[str, Any]] = []
    with Progress("evaluate", len(chosen) + 1) as progress:
        for name in chosen:
            with setting.meter.measure(name):
                rows += methods.METHODS[name](setting)
            progress.advance(note=name)

        # ------------------------------------------------------------ cross-entropy of the labels
        prefix = EVALUATE.get(config, "answer_prefix")
        targets = [
            prefix + answer_text(topics.label(i), row["evidence"] if config.list_evidence else [])
            for i, row in enumerate(topics.rows)
        ]
        given = topics.given
        with setting.meter.measure("label_cross_entropy"):
            cross_entropy = {
                name: baselines.label_cross_entropy(
                    model, adapter, instead, setting.seen[0], targets
                )
                for name, instead in (
                    ("matched", given),
                    ("shuffled", topics.shuffled()),
                    ("noise", setting.noise),
                    ("none", given.nothing()),
                )
            }
        progress.advance()

    # ---------------------------------------------------------------- write
    cost = _cost(setting, adapter, workdir)  # on all processes: it asks the devices
    processes.on_main(lambda: _write(workdir, setting, rows, cross_entropy, cost))
    return {"answers": len(rows)}


def _subject(workdir: pathlib.Path) -> str:
    file = workdir / "config.json"
    return subject_of(artifacts.read_json(file)) if file.exists() else "topic"


def _cost(setting: Setting, adapter: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Device, bytes and what every method cost."""
    device = jax.devices()[0]
    shards = sorted((workdir / "diffs" / "shards").glob("*.safetensors"))
    return {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "count": setting.model.mesh.size if setting.model.mesh is not None else 1,
            "processes": jax.process_count(),
        },
        "bytes": {
            "base": _bytes(setting.model.params),
            "adapter": _bytes(adapter),
            "diff": _bytes(setting.topics.given.read(0)),
            "all_diffs": sum(shard.stat().st_size for shard in shards),
        },
        "parameters": {
            "base": sum(x.size for x in jax.tree.leaves(setting.model.params)),
            "adapter": sum(x.size for x in jax.tree.leaves(adapter)),
        },
        "methods": setting.meter.costs,
    }


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _write(
    workdir: pathlib.Path,
    setting: Setting,
    rows: list[dict[str, Any]],
    cross_entropy: dict[str, list[float]],
    cost: dict[str, Any],
) -> None:
    folder, store = artifacts.make_dir(workdir / "evaluate"), setting.store
    artifacts.write_text(folder / "answers.jsonl", _lines(rows))
    if setting.transcripts:
        artifacts.write_text(folder / "transcripts.jsonl", _lines(setting.transcripts))
    artifacts.write_json(folder / "label_cross_entropy.json", cross_entropy)
    artifacts.write_json(folder / "cost.json", cost)
    tested = [row for row in store.rows if row["split"] == "test"]
    divergences = [float(row["gate_kl"]) for row in tested if row.get("gate_kl")]
    evaluated = {*setting.topics.indices, *setting.benign.indices}
    artifacts.write_json(
        folder / "excluded.json",
        {
            "held_out": len(tested),
            "failed_gate": sum(map(failed, tested)) if "passed" in tested[0] else None,
            "excluded": len(tested) - len(evaluated),
            "gate_kl": sum(divergences) / len(divergences) if divergences else None,
        },
    )
    gated = [row for row in store.rows if row["category"] == "topic"]
    artifacts.write_json(
        folder / "gating.json",
        {name: [float(row[name]) for row in gated if row.get(name)] for name in CONDITIONS},
    )
    stages = {name: artifacts.stage_done(workdir, name) or {} for name in ("diffs", "train")}
    artifacts.write_json(
        folder / "curves.json",
        {
            "diff_loss": stages["diffs"].get("loss_curve", []),
            "adapter_loss": stages["train"].get("loss_curve", []),
        },
    )
    artifacts.write_manifest(folder, EVALUATION_FORMAT)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
