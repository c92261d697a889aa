"""How many training diffs an adapter needs on a real language model, at a constant number of adapter steps.

    python -m dit_jax.sweep --sweep configs/sweeps/real_scaling.py --workdir runs/real_scaling

The first run makes the corpus and all diffs; the others take its diffs, and train and evaluate an adapter each, about
eight minutes on two cores. A finished `runs/real_small`, moved to `runs/real_scaling/real_small`, is the first run.
Writes real_scaling.md, .csv and .png into the workdir.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/real.py:small"
SWEPT = "train.max_diffs"
METRIC = "methods.dit.exact_match"
TABLE = "real_scaling"


def get_sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "real_small", {}  # all 144 training diffs
    for count in (72, 36):
        yield (
            f"diffs_{count}",
            {
                "stages": ("diffs", "train", "evaluate", "report"),
                "train.max_diffs": count,
                "evaluate.methods": ("dit", "no_diff", "shuffled_diff"),
            },
        )
