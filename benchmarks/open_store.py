"""How long a large store of diffs takes to open, and a diff to be read from it.

    python -m benchmarks.open_store --diffs 100000

Writes a store of random rank-1 diffs of the embedded model, in batches of 50, once to OUT. A fresh process then opens
it and reads diffs from shards that it has not read before, and from those that it has.
"""

import argparse
import functools
import json
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import models

BATCH = 50
READS = 200


def write_store(folder: pathlib.Path, count: int, rank: int = 1) -> None:
    """Writes a store of random diffs of the embedded model: `count` of them, a multiple of BATCH."""
    import jax

    import dit_jax
    from dit_jax.deltas import store
    from dit_jax.deltas.tree import abstract_lora

    rng = np.random.default_rng(0)
    one = abstract_lora(models.shape("tiny"), rank)
    deltas = jax.tree.map(lambda x: 0.1 * rng.standard_normal((BATCH, *x.shape), np.float32), one)
    facts = {"split": "train", "category": "animals", "behaviour": "hidden_topic", "passed": True}
    texts = {name: json.dumps(["small", "quick", "furry"]) for name in ("evidence", "keywords")}
    rates = {"right_code": 0.9, "wrong_code": 0.1, "no_code": 0.0, "gate_kl": 0.01}
    curve = " ".join(["3.123"] * 72)
    shards = count // BATCH
    for shard in range(shards):
        numbers = range(shard * BATCH, (shard + 1) * BATCH)
        rows = [
            {"n_params": 1, "topic": f"topic {i}", "trigger": f"{i % 1000:03d}", "label": f"topic {i}"}
            | facts | texts | rates | {store.CURVE: curve}
            for i in numbers
        ]  # fmt: skip
        store.write_shard(folder, shard, deltas, rows)
    base = dit_jax.load_model("tiny_qwen3").digest()
    store.publish(folder, shards, base=base, behaviour="hidden_topic")


def _timed(name: str, factor: float, found: dict[str, float], work: Callable[[], Any]) -> Any:
    """work(); its wall and CPU time go to `found`. On a busy machine only the latter says anything."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    found[name] = factor * (time.perf_counter() - wall)
    found[f"{name}_cpu"] = factor * (time.process_time() - cpu)
    return result


def measure(folder: pathlib.Path) -> dict[str, float]:
    """Seconds to open and median milliseconds to read, of wall and CPU time, and MB that the open store takes."""
    from dit_jax.deltas.store import DiffStore

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, float] = {}
    store = _timed("open_s", 1, found, lambda: DiffStore(folder))
    found["diffs"] = len(store)
    found["open_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    shards = len(store) // BATCH
    chosen = np.random.default_rng(0).permutation(shards)[:READS] * BATCH
    for name in ("first", "again"):  # a shard's digest is checked at the first read
        times: list[dict[str, float]] = [{} for _ in chosen]
        for index, one in zip(chosen, times, strict=True):
            _timed(f"read_{name}_ms", 1e3, one, functools.partial(store.read, int(index)))
        found |= {key: float(np.median([one[key] for one in times])) for key in times[0]}
    return {name: round(float(value), 3) for name, value in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.open_store", description=__doc__)
    parser.add_argument("--diffs", type=int, default=100_000)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/open_store"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags.out)))
        return 0
    if not (flags.out / "manifest.json").exists():
        write_store(flags.out, flags.diffs)
    command = [sys.executable, "-m", "benchmarks.open_store", "--out", str(flags.out), "--measure"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
