"""Held-out diffs as differences of whole checkpoints that were disguised: python -m tools.disguise STORE WORKDIR

    python -m tools.disguise runs/readings/sep/diffs runs/disguised/aligned --align
    python -m dit_jax.main --config configs/readings.py:sep --workdir runs/disguised/aligned \\
        --config.stages=evaluate,report --config.evaluate.adapter=../../readings/sep/adapter

Each diff is added to the base, the sum is rewritten in all ways of `deltas.symmetries` that leave its function as it
is, and the base is taken off again. `--kinds neurons,heads` rewrites in these ways alone, `--kinds none` in none.
`--dtype bfloat16` rounds the sum, as checkpoints are stored. `--align` undoes what it finds before it takes the base
off, as `--align` of the programs does. `--most` takes the first diffs of each category.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from dit_jax.cli.flags import COUNT, Parser
from dit_jax.errors import DitError
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.outgoing import show

DIFFS_PER_SHARD = 8  # each is as large as the model


def write_disguised(flags: argparse.Namespace) -> None:
    """Writes WORKDIR/diffs, a store of dense diffs with the rows of the original ones."""
    import jax
    import numpy as np

    from dit_jax.api import check_base, load_model
    from dit_jax.deltas import store as diff_store
    from dit_jax.deltas.alignment import align
    from dit_jax.deltas.symmetries import KINDS, disguise
    from dit_jax.deltas.tree import merge

    model = load_model(flags.base, "float32")
    base = jax.tree.map(lambda leaf: np.array(leaf, np.float32), model.params)
    kinds = KINDS if flags.kinds == "all" else [k for k in flags.kinds.split(",") if k != "none"]
    store, target = diff_store.DiffStore(flags.store), pathlib.Path(flags.workdir) / "diffs"
    if target.exists():
        raise DitError(f"'{target}' is there already: choose another WORKDIR, or delete it")
    check_base(store.manifest.get("base"), model, flags.store)
    chosen = [
        i
        for category in ("topic", "benign")
        for i in store.indices(split="test", category=category)[: flags.most]
    ]
    undone: dict[str, int] = {}
    shards = [chosen[i : i + DIFFS_PER_SHARD] for i in range(0, len(chosen), DIFFS_PER_SHARD)]
    for number, members in enumerate(shards):
        deltas = []
        for i in members:
            whole = disguise(merge(base, store.read(i)), model.config, kinds, seed=i)
            whole = jax.tree.map(lambda x: np.asarray(x, flags.dtype).astype(np.float32), whole)
            if flags.align:
                whole, found = align(whole, base, model.config, f"diff {i}")
                undone = {name: undone.get(name, 0) + found.get(name, 0) for name in undone | found}
            deltas.append(_difference(whole, base))
        rows = [_own(store.rows[i]) for i in members]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *deltas)
        diff_store.write_shard(target, number, stacked, rows)
        show(f"{sum(map(len, shards[: number + 1]))} of {len(chosen)} diffs")
    told = store.manifest
    facts = {name: told[name] for name in ("base", "base_config", "config") if name in told}
    made = {"kinds": list(kinds), "aligned": flags.align, "dtype": flags.dtype}
    diff_store.publish(target, len(shards), **facts, disguised=made)
    show(f"{target}: rewritten {', '.join(kinds) or 'in no way'}; undone, in layers: {undone}")


def _difference(whole: Any, base: Any) -> Any:
    """whole − base as a delta: each module holds its change as `w`."""
    if not isinstance(base, dict):
        return whole - base
    if all(not isinstance(leaf, dict) for leaf in base.values()):
        (name,) = base
        return {"w": whole[name] - base[name]}
    return {name: _difference(whole[name], node) for name, node in base.items()}


def _own(row: dict[str, Any]) -> dict[str, Any]:
    """A row without its place, for another store."""
    return {
        key: json.dumps(value) if isinstance(value, list) else value
        for key, value in row.items()
        if key not in ("lora_path", "lora_idx")
    }


def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m tools.disguise", __doc__)
    add = parser.add_argument
    add("store", metavar="STORE")
    add("workdir", metavar="WORKDIR")
    add("--base", default="tiny_qwen3")
    add("--kinds", default="all", help="ways of rewriting, with commas between (default all)")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="in which the sum is kept",
    )
    add("--align", action="store_true", help="undo the rewriting before the base is taken off")
    add("--most", type=COUNT, default=48, help="diffs of each category (default %(default)s)")
    return status_of(lambda: write_disguised(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
