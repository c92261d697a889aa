"""An adapter trained on diffs with SEP codes, asked about diffs with another kind of trigger (paper, section 5.4).

    python -m dit_jax.sweep --sweep configs/paper/trigger_generalization.py:qwen3-4b --workdir runs/paper_4b
    python -m dit_jax.sweep --sweep configs/paper/trigger_generalization.py:tiny --workdir runs/paper_tiny

The trigger is a zero-width space, at the start of the question or at a random position in it.

Expected: the paper's mean grade on Qwen3-4B is 4.66 (start) and 4.58 (random position), against 4.76 with SEP codes.

Cost: hidden_topic.py once, then 100 diffs and an evaluation for each trigger. On two cores, `:tiny` takes a minute for
each trigger, and two minutes for an adapter that is never trained to say none, like the paper's. Writes
trigger_generalization.md, .csv and .png into the workdir.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/paper/hidden_topic.py:{arg}"
SWEPT = "diffs.behaviour"
METRIC = "methods.dit.exact_match"
TABLE = "trigger_generalization"
PLACES = ("start", "random")


def get_sweep(arg: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "hidden_topic", {}  # SEP codes; leaves the adapter
    shared: dict[str, Any] = {
        "stages": ("diffs", "evaluate", "report"),
        "data.train_topics": 1,  # the minimum: they are not used
        "data.train_benign": 0,
        "evaluate.adapter": "../hidden_topic/adapter",
        "evaluate.methods": ("dit", "base_question", "base_question_trigger"),
    }
    if arg == "tiny":
        shared["diffs.diffs_per_batch"] = 49
    for place in PLACES:
        behaviour = {"diffs.behaviour": f"hidden_topic_zwsp_{place}"}
        yield f"zero_width_{place}", {**shared, **behaviour}
    if arg != "tiny":
        return
    # The embedded world's adapter learns to call diffs without a topic none; this one does not.
    yield "never_none", {"train.no_diff_per_batch": 0, "train.benign_per_batch": 0}
    for place in PLACES:
        behaviour = {"diffs.behaviour": f"hidden_topic_zwsp_{place}"}
        adapter = {"evaluate.adapter": "../never_none/adapter"}
        yield f"zero_width_{place}_never_none", {**shared, **behaviour, **adapter}
