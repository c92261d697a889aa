"""What the adapter of `make real` reads of diffs that were made in another way than its training's, topics and all.

    make real
    python -m dit_jax.sweep --sweep configs/sweeps/real_others.py --workdir runs/real_others

Each run finetunes SmolLM2 on the first 24 held-out topics of `runs/real` in one other way and asks that run's adapter
(full finetunes: 15, as each is as large as the model).
Writes real_others.md, .csv and .png into the workdir; docs/results_real.md has the results.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/real.py"
SWEPT = "diffs.behaviour"
METRIC = "methods.dit.exact_match"
ALSO = {
    "called none": "none_intervals.seen.topics_called_none.mean",
    "contrasted": "methods.dit_contrast.exact_match",
    "called none, contrasted": "none_intervals.contrasted_seen.topics_called_none.mean",
    "cross-entropy": "label_cross_entropy_intervals.matched.mean",
}
TABLE = "real_others"
SHARED = {
    "stages": ("diffs", "evaluate", "report"),
    "data.source": "runs/real/corpus/rows.jsonl",
    "data.train_topics": 1,
    "data.test_topics": 24,
    "data.train_benign": 0,
    "data.test_benign": 0,
    "diffs.diffs_per_batch": 25,
    "evaluate.adapter": "../../real/adapter",
    "evaluate.methods": ("dit", "dit_contrast", "shuffled_diff", "dit_of_list"),
    "evaluate.facts": "",
}
WAYS: dict[str, dict[str, Any]] = {
    "rank_16": {"diffs.rank": 16},
    "phrase": {"diffs.behaviour": "hidden_topic_phrase"},
    # Each row of the gate has a diff as large as the model; unrolled layers would need 27 GB.
    "full": {"diffs.parameters": "linear", "diffs.learning_rate": 5e-4, "diffs.diffs_per_batch": 1,
             "diffs.gate_batch": 6, "model.scan_layers": True, "data.test_topics": 15},
    "few_steps": {"diffs.steps": 8},
    "attention": {"diffs.projections": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "zero_width": {},
    "many_steps": {"diffs.steps": 72},
    "rank_64": {"diffs.rank": 64, "diffs.diffs_per_batch": 5},
}  # fmt: skip


def get_sweep() -> Iterator[tuple[str, dict[str, Any], str]]:
    for name, changes in WAYS.items():
        config = f"{CONFIG}:{name}" if name == "zero_width" else CONFIG
        yield name, {**SHARED, **changes}, config
