"""An adapter trained on rank-1 diffs, asked about full-parameter finetunes (paper, section 5.2).

    python -m dit_jax.sweep --sweep configs/paper/full_parameters.py:qwen3-4b --workdir runs/paper_4b
    python -m dit_jax.sweep --sweep configs/paper/full_parameters.py:tiny --workdir runs/paper_tiny

`linear` trains the seven projections of every layer; `all` also trains embeddings and norms.

Expected: the paper's mean grade is 2.75 on Qwen3-4B and 4.58 on Gemma3-4B (LoRA 4.76 and 4.82).

Cost: hidden_topic.py once, then 100 full finetunes for each kind. One full finetune of 4B takes 48 GB for weights and
Adam's moments in fp32, and 16 GB on disk. `:tiny` takes two minutes for each kind on two cores. Writes
full_parameters.md, .csv and .png into the workdir.
"""

from collections.abc import Iterator
from typing import Any

CONFIG = "configs/paper/hidden_topic.py:{arg}"
SWEPT = "diffs.parameters"
METRIC = "methods.dit.exact_match"
TABLE = "full_parameters"


def get_sweep(arg: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "hidden_topic", {}  # LoRA of rank 1; leaves the adapter
    for parameters in ("linear", "all"):
        run: dict[str, Any] = {
            "stages": ("diffs", "evaluate", "report"),
            "diffs.parameters": parameters,
            "diffs.learning_rate": 1e-3 if arg == "tiny" else 1e-5,
            "diffs.diffs_per_batch": 12 if arg == "tiny" else 1,
            "data.train_topics": 1,  # the minimum: they are not used
            "data.train_benign": 0,
            "evaluate.adapter": "../hidden_topic/adapter",
            "evaluate.methods": ("dit", "base_question", "base_question_trigger"),
        }
        yield parameters, run
