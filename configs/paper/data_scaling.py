"""How many training diffs an adapter needs, at a constant number of adapter steps (paper, section 5.3).

    python -m dit_jax.sweep --sweep configs/paper/data_scaling.py:qwen3-4b --workdir runs/paper_4b
    python -m dit_jax.sweep --sweep configs/paper/data_scaling.py:tiny --workdir runs/paper_tiny

Expected: the paper's mean grade on Qwen3-4B is

    diffs     4     18     72    145    291    582   1165   4660
    grade  1.19   1.60   3.24   3.78   4.17   4.49   4.73   4.78

Cost: the diffs of hidden_topic.py once (reused if its run is in the workdir as `hidden_topic`), then an adapter of 583
steps and an evaluation for each count. `:tiny` takes a minute for each of seven counts on two cores.
Writes data_scaling.md, .csv and .png into the workdir.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/paper/hidden_topic.py:{arg}"
SWEPT = "train.max_diffs"
METRIC = "methods.dit.exact_match"
TABLE = "data_scaling"
COUNTS = (4, 18, 72, 145, 291, 582, 1165)


def get_sweep(arg: str) -> Iterator[tuple[str, dict[str, Any]]]:
    methods = ("dit", "no_diff", "shuffled_diff")
    yield "hidden_topic", {}  # all diffs
    for count in (1, 2, 4, 8, 16, 32, 64) if arg == "tiny" else COUNTS:
        yield f"diffs_{count}", {"train.max_diffs": count, "evaluate.methods": methods}
