"""A run of the quickstart's config that takes seconds, and what it leaves. Who uses it shares its compiled programs."""

import pathlib
from typing import Any

from dit_jax.deltas.store import DiffStore
from dit_jax.runtime.artifacts import read_json
from dit_jax.runtime.metrics import read_records

SMALL = (
    "--config.model.scan_layers=True",  # compiles in half the time
    "--config.mesh.data=1",  # test_multiprocess.py runs it sharded
    "--config.data.train_topics=10",
    "--config.data.test_topics=4",
    "--config.data.train_benign=2",
    "--config.data.test_benign=2",
    "--config.diffs.diffs_per_batch=12",
    "--config.diffs.steps=3",
    "--config.diffs.gate_questions=1",
    "--config.diffs.gate_batch=36",
    "--config.train.steps=12",
    "--config.train.batch_size=8",
    "--config.train.save_every=4",
    "--config.evaluate.batch_size=16",
)


def flags(workdir: Any, *extra: str) -> list[str]:
    """The command line of such a run; `extra` comes last and so overrides."""
    return ["--config", "configs/quickstart.py", "--workdir", str(workdir), *SMALL, *extra]


def diffs_of(workdir: pathlib.Path) -> dict[str, Any]:
    """The diffs of a run, as bytes and rows that do not depend on the time."""
    store = DiffStore(workdir / "diffs")
    store.stacked(range(len(store)))  # reads every shard, and so compares it with its digest
    files = [*(workdir / "diffs").rglob("*.safetensors"), *(workdir / "diffs").rglob("0*.json")]
    files += [workdir / "diffs" / "index.csv"]
    changing = ("created", "packages")
    return {
        **{str(file.relative_to(workdir)): file.read_bytes() for file in files},
        "rows": [(row["topic"], row["trigger"]) for row in store.rows],
        "manifest": {key: x for key, x in store.manifest.items() if key not in changing},
    }


def results(workdir: pathlib.Path) -> dict[str, Any]:
    """All results of a run, as bytes and numbers that do not depend on the time."""
    files = [workdir / "evaluate" / f for f in ("answers.jsonl", "label_cross_entropy.json")]
    manifest = read_json(workdir / "adapter" / "manifest.json")
    curve = read_records(workdir / "metrics" / "train.jsonl")
    return {
        **diffs_of(workdir),
        **{str(file.relative_to(workdir)): file.read_bytes() for file in files},
        "adapter": manifest["digest"],
        "losses": [(record["step"], record["loss"]) for record in curve],
    }
