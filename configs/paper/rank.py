"""An adapter trained on rank-1 diffs, asked about diffs of other ranks (paper, section 5.2).

    python -m dit_jax.sweep --sweep configs/paper/rank.py:qwen3-4b --workdir runs/paper_4b
    python -m dit_jax.sweep --sweep configs/paper/rank.py:tiny --workdir runs/paper_tiny

Expected: the paper's mean grade is flat, 4.54 to 4.79 for ranks 1 to 64 on Qwen3-4B. For Gemma (`:gemma3-4b`) the
paper goes on to rank 128.

Cost: hidden_topic.py once, then 100 diffs and an evaluation for each rank. `:tiny` takes a minute for each rank on two
cores. Writes rank.md, .csv and .png into the workdir.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/paper/hidden_topic.py:{arg}"
SWEPT = "diffs.rank"
METRIC = "methods.dit.exact_match"
TABLE = "rank"


def get_sweep(arg: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "hidden_topic", {}  # rank 1; leaves the adapter
    ranks = (2, 4, 8, 16) if arg == "tiny" else (2, 4, 8, 16, 32, 64)
    for rank in (*ranks, 128) if arg.startswith("gemma3") else ranks:
        run: dict[str, Any] = {
            "stages": ("diffs", "evaluate", "report"),
            "diffs.rank": rank,
            "data.train_topics": 1,  # the minimum: they are not used
            "data.train_benign": 0,
            "evaluate.adapter": "../hidden_topic/adapter",
            "evaluate.methods": ("dit", "base_question", "base_question_trigger"),
        }
        if arg == "tiny":
            run |= {"diffs.diffs_per_batch": 49}
        yield f"rank_{rank}", run
