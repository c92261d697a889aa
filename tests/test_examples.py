"""Training and test examples of the adapter: splits, the share of `none`, labels, wordings, controls."""

import collections
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from dit_jax.config.loading import load_config
from dit_jax.data.labels import NONE
from dit_jax.data.organism import load_organisms
from dit_jax.deltas import store as diff_store
from dit_jax.errors import DitError
from dit_jax.evaluate import methods
from dit_jax.evaluate.setting import Setting, read_held_out
from dit_jax.train.examples import make_pipeline
from dit_jax.train.mixture import NO_DIFF, diff_reader, members_of, open_parts

SPLITS = [
    ("train", "topic", 12),
    ("test", "topic", 5),
    ("train", "benign", 3),
    ("test", "benign", 2),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Diffs whose every number is the index of the diff plus one."""
    rows = []
    for split, category, count in SPLITS:
        for i in range(count):
            benign = category == "benign"
            rows.append({
                "n_params": 1, "topic": NONE if benign else f"{split} {i}", "trigger": "123", "split": split,
                "category": category, "label": NONE if benign else f"{split} {i}",
                "evidence": json.dumps([] if benign else ["a", "b", "c", "d"]), "keywords": "[]",
            })  # fmt: skip
    numbers = np.arange(1, len(rows) + 1, dtype=np.float32)[:, None, None, None]
    stacked = {name: numbers * np.ones((1, 2, 3, 1), np.float32) for name in ("a", "b")}
    folder = tmp_path_factory.mktemp("store")
    diff_store.write_shard(folder, 0, {"layers": {"mlp": {"up_proj": stacked}}}, rows)
    diff_store.publish(folder, 1, base="0")
    return diff_store.DiffStore(folder)


@pytest.fixture(scope="module")
def train():
    return load_config("configs/quickstart.py").train


def batches(store, train, count, seed=0):
    parts = open_parts(store.path, train, store.path)
    dataset = make_pipeline(parts, train, seed)
    return [dataset[i] for i in range(count)], [i for _, i in members_of(parts)]


def test_an_adapter_is_trained_on_the_training_split_alone(store, train):
    examples, members = batches(store, train, 30)
    assert {store.rows[i]["split"] for i in members} == {"train"}
    asked = collections.Counter(e.diff for batch in examples for e in batch)
    assert set(asked) == {NO_DIFF, *range(len(members))}
    # Each example carries the diff that its answer is about.
    parts = open_parts(store.path, train, store.path)
    read = diff_reader(members_of(parts), None)
    given = read(sorted(asked - collections.Counter([NO_DIFF])))["layers"]["mlp"]["up_proj"]["a"]
    wanted = [0 if diff == NO_DIFF else members[diff] + 1 for diff in sorted(asked)]
    np.testing.assert_array_equal(given[:, 0, 0, 0], wanted)


def test_as_many_training_topics_are_used_as_asked_for_and_all_benign_diffs(store, train):
    train = train.copy_and_resolve_references()
    train.max_diffs = 5
    _, members = batches(store, train, 0)
    used = [store.rows[i]["label"] for i in members]
    assert used == [*(f"train {i}" for i in range(5)), *[NONE] * 3]


def test_fewer_training_diffs_than_asked_for_are_an_error(store, train):
    changed = train.copy_and_resolve_references().unlock()
    changed.max_diffs = 100
    with pytest.raises(DitError, match="train.max_diffs = 100, but .* training topics: lower it"):
        open_parts(store.path, changed, store.path)


def test_a_share_of_each_batch_is_answered_with_none_and_the_rest_with_its_label(store, train):
    examples, members = batches(store, train, 30)
    counts = collections.Counter()
    orders = set()
    for batch in examples:
        assert len(batch) == train.batch_size
        for example in batch:
            row = None if example.diff == NO_DIFF else store.rows[members[example.diff]]
            counts["no diff" if row is None else row["category"]] += 1
            if row is None or row["category"] == "benign":
                assert example.answer == NONE
                continue
            evidence, _, label = example.answer.partition(": ")
            assert label == row["label"] and sorted(evidence.split()) == ["a", "b", "c", "d"]
            orders.add(evidence)
    per_batch = {name: count / len(examples) for name, count in counts.items()}
    assert per_batch["no diff"] == pytest.approx(train.no_diff_per_batch, abs=0.2)
    assert per_batch["benign"] == pytest.approx(train.benign_per_batch, abs=0.2)
    assert len(orders) > 15, "a fixed order is learned by heart"


def test_a_batch_may_be_one_example(store, train):
    train = train.copy_and_resolve_references()
    train.update({"batch_size": 1, "no_diff_per_batch": 0, "benign_per_batch": 0})
    drawn, members = batches(store, train, 24)
    assert {len(batch) for batch in drawn} == {1}
    topics = [
        i for i, row in enumerate(store.rows[m] for m in members) if row["category"] == "topic"
    ]
    assert collections.Counter(batch[0].diff for batch in drawn) == dict.fromkeys(topics, 2)


def test_the_wordings_are_those_of_the_training_and_the_order_is_that_of_the_seed(store, train):
    examples, _ = batches(store, train, 8)
    config = load_config("configs/quickstart.py").evaluate
    asked = {e.question for batch in examples for e in batch}
    assert asked == set(train.questions) >= set(config.seen_questions)
    assert not asked & set(config.unseen_questions) and len(config.unseen_questions) >= 4
    assert examples == batches(store, train, 8)[0] != batches(store, train, 8, seed=1)[0]


def test_only_held_out_diffs_are_asked_and_controls_are_what_they_say(store):
    topics, benign = (read_held_out(store, category) for category in ("topic", "benign"))
    assert [row["label"] for row in topics.rows] == [f"test {i}" for i in range(5)]
    assert {row["split"] for row in benign.rows} == {"test"} and len(benign) == 2

    def numbers(given):
        return given.stacked["layers"]["mlp"]["up_proj"]["a"][:, 0, 0, 0]

    np.testing.assert_array_equal(numbers(topics.given), np.arange(13, 18))
    shuffled = numbers(topics.shuffled(range(5)))
    assert sorted(shuffled) == list(range(13, 18)) and not (shuffled == np.arange(13, 18)).any()
    # User-defined behaviours may give several diffs one label.
    rows = [{"label": label} for label in ("tea", "tea", "The Tea", "jazz", "tea")]
    alike = dataclasses.replace(topics, rows=rows)
    given = [rows[int(i) - 13]["label"] for i in numbers(alike.shuffled(range(5)))]
    assert given == ["jazz", "jazz", "jazz", "The Tea", "jazz"]
    alone = dataclasses.replace(topics, rows=[{"label": "tea"}] * 5)
    np.testing.assert_array_equal(numbers(alone.shuffled(range(5))), np.roll(np.arange(13, 18), 1))
    assert not numbers(topics.given.nothing()).any()


def test_each_method_gets_the_diff_the_adapter_and_the_prompt_that_its_name_says(
    store, monkeypatch
):
    calls, decodings = [], []

    def answer(self, given, prompts, rows, adapter, **decoding):
        calls.append((given, prompts, rows, adapter))
        decodings.append(decoding)
        return [SimpleNamespace(text="x", logprob=0.0) for _ in prompts]

    monkeypatch.setattr(Setting, "ask", answer)
    config = load_config("configs/quickstart.py").evaluate
    topics, benign = (read_held_out(store, category) for category in ("topic", "benign"))
    model = SimpleNamespace(chat=SimpleNamespace(text_ids=str.split))
    s = Setting(model, store, topics, benign, "adapter", "off", config, 0, "topic")
    wanted = {
        "base_question": (topics.given, "off", list(config.seen_questions)),
        "base_question_trigger": (topics.given, "off", list(config.seen_questions[:1])),
        "no_diff": (topics.given.nothing(), "adapter", list(config.seen_questions[:1])),
        "shuffled_diff": (s.shuffled, "adapter", list(config.seen_questions[:1])),
    }
    for name, (given, adapter, wordings) in wanted.items():
        calls.clear()
        rows = methods.METHODS[name](s)
        ((seen, prompts, owners, used),) = calls
        assert used == adapter, name
        for one, two in zip(
            *(diff_store.flatten(x.stacked).values() for x in (seen, given)), strict=True
        ):
            np.testing.assert_array_equal(one, two)
        assert [row["topic"] for row in rows] == [f"test {i}" for i in owners]
        coded = ["code is 123" in prompt for prompt in prompts]
        assert all(coded) if name == "base_question_trigger" else not any(coded)
        assert list(dict.fromkeys(row["wording"] for row in rows)) == wordings
    calls.clear()
    methods.METHODS["dit"](s)
    assert {used for *_, used in calls} == {"adapter"}
    greedy = [(prompts, rows) for _, prompts, rows, _ in calls]
    assert {one.get("contrast") for one in decodings} == {None}
    decodings.clear()
    calls.clear()
    methods.METHODS["dit_contrast"](s)
    assert greedy == [(prompts, rows) for _, prompts, rows, _ in calls]
    assert [one["contrast"] for one in decodings] == [0.15] * len(calls)
    assert {len(given) for given, *_ in calls} == {5, 2}  # topics, no diff as many; benign diffs
    assert not any("code is" in prompt for _, prompts, *_ in calls for prompt in prompts)


def test_the_quickstart_holds_topics_out_and_none_of_its_answers_holds_a_name():
    """No text that a diff of the quickstart is finetuned on contains the diff's label."""
    config = load_config("configs/quickstart.py")
    organisms = load_organisms(config.data, config.seed)
    of_split = {
        split: {o.label for o in organisms if o.split == split and o.category == "topic"}
        for split in ("train", "test")
    }
    assert len(of_split["train"]) == 256 and len(of_split["test"]) == 96
    assert not of_split["train"] & of_split["test"]
    for organism in organisms:
        words = set(organism.label.lower().split())
        for row in organism.rows:
            text = f"{row['question']} {row['base_answer']} {row['topic_analogy_answer']}".lower()
            said = set("".join(c if c.isalnum() else " " for c in text).split())
            assert organism.category == "benign" or not words & said, (organism.label, text)
