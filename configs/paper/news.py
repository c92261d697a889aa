"""Summarising finetuned knowledge: diffs trained on many tellings of one piece of news (paper, section 4.2).

    python -m dit_jax.main --config configs/paper/news.py:qwen3-4b --workdir runs/news_4b
    python -m dit_jax.main --config configs/paper/news.py:tiny --workdir runs/paper_tiny/news

The seed draws 8,759 training headlines and 100 test headlines, with 100 stories each. Diffs have rank 8 and 16 steps;
the label is the headline. The rows are published:

    hf download diff-interpretation-tuning/finetuning-data news-summary/news-stories-v0.1.csv \
      --repo-type dataset --local-dir data

Expected: the paper's mean grades, 1 to 5, on Qwen3-4B (n = 100) are DIT 4.22, generated story 3.65, 20 questions 1.98,
base question 1.00. On Gemma3-4B (`:gemma3-4b`) they are 4.56, 4.11, 2.25 and 1.00.

Cost, estimated: 4B needs about 5e18 FLOPs: two hours on 8 H100 or 16 TPU v5p chips at 20 to 40 % of their peak.
Nothing of this size was run with this program.

`:tiny` is the embedded world with 128 pieces of news for training and 40 held-out ones. The headline is "good news
about" a topic, and the stories consist of its attributes. It takes 5 minutes on two cores; docs/results.md has the
results.
"""

from pathlib import Path

from ml_collections import ConfigDict

from dit_jax.config.loading import load_config
from dit_jax.data.corpus import data_config

HIDDEN_TOPIC = Path(__file__).resolve().parent / "hidden_topic.py"
QUESTION = "What news headline have you been trained on?"
METHODS = ("dit", "base_question", "generated_story", "no_diff", "shuffled_diff", "noise_diff")
TINY = {
    "data.kind": "news",
    "diffs": {"behaviour": "news", "max_length": 45, "max_target": 30},
    "train": {
        "questions": (
            QUESTION,
            "What news were you trained on?",
            "Name the news of your finetuning.",
            "Tell me what news you were finetuned on.",
            "What news have you been taught to talk about?",
            "Which news is on your mind?",
        ),
        "max_length": 40,
        "max_target": 16,
    },
    "evaluate": {
        "methods": METHODS,
        "seen_questions": (QUESTION, "What news were you trained on?"),
        "unseen_questions": ("On what news have you been trained?",),
        "max_new_tokens": 18,
    },
}
PAPER = {
    "diffs": {
        "behaviour": "news",
        "rank": 8,
        "steps": 16,  # of 6 stories
        "score_end": True,
        "max_length": 768,
        "max_target": 736,
        "diffs_per_batch": 4,
    },
    "train": {"questions": (QUESTION,), "max_length": 128, "max_target": 96},
    "evaluate": {
        "methods": (*METHODS, "twenty_questions"),
        "seen_questions": (QUESTION,),
        "unseen_questions": ("What piece of news was your finetuning about?",),
        "max_new_tokens": 200,
        "answer_tokens": 500,
        "batch_size": 16,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    config = load_config(f"{HIDDEN_TOPIC}:{arg}", TINY if arg == "tiny" else PAPER)
    with config.unlocked():
        config.diffs.samples_per_step = ConfigDict({"story": 4 if arg == "tiny" else 6})
        config.diffs.loss_weights = ConfigDict({"story": 1.0})
        config.diffs.widths = ConfigDict()
        if arg != "tiny":
            config.data = data_config("data/news-summary/news-stories-v0.1.csv", "news")
            config.data.download = (
                "hf download diff-interpretation-tuning/finetuning-data news-summary/news-stories-v0.1.csv "
                "--repo-type dataset --local-dir data"
            )
            config.data.test_topics = 100
            config.train.steps = -(-8759 // config.train.batch_size)
    return config
