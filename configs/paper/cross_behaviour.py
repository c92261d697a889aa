"""Adapters asked about the other behaviour: topics on news diffs, news on topic diffs (paper, section 5.5).

    python -m dit_jax.sweep --sweep configs/paper/cross_behaviour.py:qwen3-4b --workdir runs/paper_4b
    python -m dit_jax.sweep --sweep configs/paper/cross_behaviour.py:tiny --workdir runs/paper_tiny

Each adapter is asked in its own words, and its answers are compared with the labels of the diffs.

Expected: the paper's mean grade on Qwen3-4B is 1.08 to 1.25, the floor.

Cost: hidden_topic.py and news.py once, then two evaluations; with `:tiny` each takes a minute on two cores. Writes
cross_behaviour.md, .csv and .png into the workdir.
"""

from collections.abc import Iterator
from typing import Any

from dit_jax.data.tiny_world import TRAIN_QUESTIONS

CONFIG = "configs/paper/hidden_topic.py:{arg}"
NEWS = "configs/paper/news.py:{arg}"
SWEPT = "evaluate.adapter"
METRIC = "methods.dit.exact_match"
TABLE = "cross_behaviour"
TOPIC_QUESTIONS = TRAIN_QUESTIONS[:1]
NEWS_QUESTIONS = ("What news headline have you been trained on?",)


def get_sweep(arg: str) -> Iterator[tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], str]]:
    yield "hidden_topic", {}
    yield "news", {}, NEWS
    shared = {
        "stages": ("diffs", "evaluate", "report"),
        "evaluate.methods": ("dit", "base_question"),
        "evaluate.unseen_questions": (),
        "evaluate.max_new_tokens": 18 if arg == "tiny" else 200,
    }
    topics = {"evaluate.adapter": "../hidden_topic/adapter"}
    yield "topic_on_news", {**shared, **topics, "evaluate.seen_questions": TOPIC_QUESTIONS}, NEWS
    news = {"evaluate.adapter": "../news/adapter"}
    yield "news_on_topic", {**shared, **news, "evaluate.seen_questions": NEWS_QUESTIONS}
