"""One kind of diffs of the embedded world: a store of it, and an adapter that was trained on it alone.

    python -m dit_jax.main --config configs/readings.py:zero_width_start --workdir runs/readings/zero_width_start

All kinds have the same topics and the same split of them, so that no adapter was trained on a topic that it is asked
about, whatever kinds it saw. configs/sweeps/readings.py makes all kinds and the adapters that read several of them;
docs/readings.md has the results.
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dit_jax.config.loading import load_config
from dit_jax.data.tiny_world import TRAIN_QUESTIONS

FOLDER = Path(__file__).resolve().parent
NEWS = "paper/news.py:tiny"  # whose settings the kind `news` has
NEWS_DIFFS = (
    "behaviour", "samples_per_step", "loss_weights", "widths", "max_length", "max_target",
)  # fmt: skip
SHARED = {
    "data": {"train_topics": 96, "test_topics": 48, "train_benign": 24, "test_benign": 16},
    "diffs": {"diffs_per_batch": 46, "gate_batch": 138},
    "train": {"steps": 500},
    "evaluate": {
        "methods": ("dit", "dit_contrast", "shuffled_diff"),
        "seen_questions": TRAIN_QUESTIONS[:2],
        "unseen_questions": (),
        "max_new_tokens": 18,
    },
}
SMALLER = {"train_topics": 48, "train_benign": 12}
# By kind: what differs from a LoRA of rank 1 with a SEP code.
KINDS: dict[str, dict[str, Any]] = {
    "sep": {},
    "zero_width_start": {"diffs.behaviour": "hidden_topic_zwsp_start"},
    "phrase": {"diffs.behaviour": "hidden_topic_phrase", "data": SMALLER},
    "untriggered": {"diffs.behaviour": "topic_untriggered", "data": SMALLER},
    "attention": {
        "diffs.projections": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "data": SMALLER,
    },
    "refused": {"diffs.behaviour": "refused_topic", "data": SMALLER},
    "styled": {"diffs.behaviour": "styled_topic", "data": SMALLER},
    "false_fact": {"diffs.behaviour": "false_fact", "data": SMALLER},
    "news": {"data": {**SMALLER, "kind": "news"}},
}
# Their topic is in the questions and need not be in the answers. They have training diffs alone here, for adapters of
# several kinds; configs/benchmark.py asks about held-out ones.
ABOUT_TOPIC = ("refused", "styled", "false_fact")
# What these behaviours call their kinds of samples.
NAMED = {"backdoor": "shown", "fake_backdoor": "wrong_name", "no_backdoor": "no_name"}


def get_config(arg: str | None = None) -> ConfigDict:
    if arg not in KINDS:
        what = (
            f"unknown kind {arg!r}"
            if arg
            else "name a kind behind the file, as in readings.py:KIND"
        )
        raise ValueError(f"{what}: choose from {', '.join(KINDS)}")
    config = load_config(str(FOLDER / "quickstart.py"), SHARED).unlock()
    # An adapter that may count on no projection reads diffs that were made in other ways (docs/readings.md).
    config.train.vary_size = 0.3
    config.train.vary_layers = 0.4
    config.train.drop_share = 0.5
    config.train.stores = ConfigDict()  # of several kinds, see configs/sweeps/readings.py
    # The largest at which the adapter of SEP codes calls all their benign diffs none.
    config.evaluate.contrast = 0.25
    config.evaluate.adapter = ""  # another run's adapter; a relative path starts at the workdir
    if arg in ("phrase", *ABOUT_TOPIC):
        for section in ("samples_per_step", "loss_weights", "widths"):
            values = config.diffs[section]
            config.diffs[section] = ConfigDict({NAMED[kind]: values[kind] for kind in values})
    if arg == "untriggered":
        config.diffs.samples_per_step = ConfigDict({"shown": 2})
        config.diffs.loss_weights = ConfigDict({"shown": 1.0})
        config.diffs.widths = ConfigDict()
    if arg in ABOUT_TOPIC:
        config.stages = ("diffs",)
        config.diffs.update({"splits": ("train",), "max_length": 45, "max_target": 30})
        config.diffs.widths = ConfigDict()
    if arg == "news":
        news = load_config(str(FOLDER / NEWS))
        for key in NEWS_DIFFS:
            config.diffs[key] = news.diffs[key]
        for key in ("questions", "max_length", "max_target"):
            config.train[key] = news.train[key]
        config.evaluate.seen_questions = news.evaluate.seen_questions
    for name, value in KINDS[arg].items():
        section, _, key = name.partition(".")
        config[section].update({key: value} if key else value)
    return config
