"""Writes dit_jax/assets/demo from a finished quickstart: its adapter, every twelfth held-out diff and a benign one.

make quickstart
python -m dit_jax.calibrate --base tiny_qwen3 --adapter runs/quickstart/adapter runs/quickstart/diffs
python -m tools.demo_files runs/quickstart
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from dit_jax.api import load_model
from dit_jax.deltas.adapter_file import export_adapter, load_adapter
from dit_jax.deltas.store import DiffStore, publish, write_shard

DEMO = Path(__file__).parent.parent / "dit_jax" / "assets" / "demo"


def _cell(value: Any) -> Any:
    """A value of an index as its file holds it."""
    return json.dumps(value) if isinstance(value, list) else value


def main(workdir: Path) -> None:
    adapter, manifest = load_adapter(workdir / "adapter", load_model("tiny_qwen3").config)
    store = DiffStore(workdir / "diffs")
    shutil.rmtree(DEMO, ignore_errors=True)
    facts = ("base", "system", "questions", "rank", "steps", "diffs", "seed", "trained_on")
    # Orbax notes the path that it wrote to.
    with tempfile.TemporaryDirectory() as place:
        export_adapter(f"{place}/adapter", adapter, **{name: manifest.get(name) for name in facts})
        shutil.copytree(f"{place}/adapter", DEMO / "adapter")
    calibration = "adapter.calibration.json"
    shutil.copyfile(workdir / calibration, DEMO / calibration)
    topics = store.indices(split="test", category="topic")[::12]
    chosen = [*topics, store.indices(split="test", category="benign")[0]]
    kept = store.rows[chosen[0]].keys() - {"lora_path", "lora_idx"}  # where it was
    rows = [{name: _cell(store.rows[i][name]) for name in sorted(kept)} for i in chosen]
    write_shard(DEMO / "diffs", 0, store.stacked(chosen), rows)
    publish(DEMO / "diffs", 1, base=store.manifest["base"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
