"""Runs one contender in its own process: load, warm up, measure, write the results.

    python -m benchmarks.contender NAME FOLDER OUT

writes OUT/result.json (times, memory, versions) and OUT/outputs.npz (`losses` or `tokens`). A program outside
this repository takes part as a command that reads FOLDER (benchmarks.workload) and writes these two files
(`--external NAME COMMAND` of benchmarks.run).
"""

import importlib
import json
import pathlib
import sys
import time
from typing import Any, Protocol

import numpy as np

from benchmarks import measure, workload

# NAME[:VARIANT] -> module with make(work, data, factors, folder, variant) -> Contender, by suite.
MODULES: dict[str, dict[str, str]] = {
    "diffs": {
        "ours": "ours",
        "peft-loop": "peft_loop",
        "torch-batched": "torch_batched",
    },
    "train": {
        "ours": "ours",
        "torch-dense": "torch_adapter",
        "torch-factored": "torch_adapter",
        "peft-one-by-one": "peft_loop",
    },
    "ask": {
        "ours": "ours",
        "generate-merged": "generate_loop",
        "generate-peft": "generate_loop",
    },
    "corpus": {
        "ours": "ours",
        "generate-batched": "generate_loop",
        "generate-one-by-one": "generate_loop",
    },
}


class Contender(Protocol):
    """warm_up compiles and allocates; run does the whole workload once and returns its outputs on the host."""

    facts: dict[str, Any]

    def warm_up(self) -> None: ...

    def run(self) -> dict[str, np.ndarray]: ...

    def device_peak(self) -> int | None:
        """Peak bytes of accelerator memory so far; None on a CPU."""

    def ceilings(self, dtype: str, platform: str) -> dict[str, float]:
        """Rates that the machine reaches through the contender's framework, see benchmarks.measure."""


def main(name: str, folder: pathlib.Path, out: pathlib.Path) -> None:
    work, data, factors = workload.read(folder)
    base, _, variant = name.partition(":")
    module = importlib.import_module(f"benchmarks.{MODULES[work.suite][base]}")
    start = time.perf_counter()
    contender: Contender = module.make(work, data, factors, folder, base, variant)
    load_seconds = time.perf_counter() - start
    measure.reset_peak_memory()
    start = time.perf_counter()
    contender.warm_up()
    warm_up_seconds = time.perf_counter() - start
    outputs, times = measure.repeat(contender.run, work.repeats)
    result = {
        **times,
        "load_seconds": load_seconds,
        "warm_up_seconds": warm_up_seconds,
        # After loading, so that reading the weights does not hide what the work itself needs.
        "peak_host_bytes": measure.peak_memory(),
        "peak_device_bytes": contender.device_peak(),
        "facts": contender.facts,
        "ceilings": contender.ceilings(work.dtype, work.platform),
    }
    np.savez(out / "outputs.npz", **outputs)
    (out / "result.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
