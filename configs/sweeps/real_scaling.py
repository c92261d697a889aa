"""How many training diffs an adapter needs on a real language model, at a constant number of adapter steps.

    python -m dit_jax.sweep --sweep configs/sweeps/real_scaling.py --workdir runs/real_scaling

The first run makes the corpus and all diffs; the others take its diffs, and train and evaluate an adapter each, about a
quarter of an hour on two cores. A finished `runs/real`, copied to `runs/real_scaling/real`, is the first run.
Writes real_scaling.md, .csv and .png into the workdir.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/real.py"
SWEPT = "train.max_diffs"
METRIC = "methods.dit_contrast.exact_match"
ALSO = {
    "greedy": "methods.dit.exact_match",
    "called none, contrasted": "none_intervals.contrasted_seen.topics_called_none.mean",
    "benign called none, contrasted": "none_intervals.contrasted_seen.benign_called_none.mean",
}
TABLE = "real_scaling"


def get_sweep() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "real", {}  # all 320 training diffs
    for count in (160, 80, 40):
        yield (
            f"diffs_{count}",
            {
                "stages": ("diffs", "train", "evaluate", "report"),
                "train.max_diffs": count,
                "evaluate.methods": ("dit", "dit_contrast", "no_diff", "shuffled_diff"),
                "evaluate.facts": "",
            },
        )
