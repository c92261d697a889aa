"""Accuracy over the number of training diffs, at a constant number of adapter steps (paper, section 5.3).

    python -m dit_jax.sweep --sweep configs/sweeps/data_scaling.py --workdir runs/data_scaling

The first run makes the diffs; the others share them. `:tiny` takes a minute and shows that it works.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/quickstart.py"
SWEPT = "train.max_diffs"
METRIC = "methods.dit.exact_match"
TINY = {
    "data": {"train_topics": 16, "test_topics": 4, "train_benign": 2, "test_benign": 2},
    "diffs": {"steps": 12, "diffs_per_batch": 24, "gate_questions": 1, "gate_batch": 24},
    "train": {"steps": 30, "batch_size": 8, "no_diff_per_batch": 1, "benign_per_batch": 1},
    "evaluate.batch_size": 16,
}


def get_sweep(arg: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    if arg not in (None, "tiny"):
        raise ValueError(f"unknown argument '{arg}': use 'tiny' or none")
    for count in (4, 16) if arg else (4, 8, 16, 32, 64, 128, 256):
        yield f"diffs_{count}", {**(TINY if arg else {}), "train.max_diffs": count}
