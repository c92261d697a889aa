"""The embedded world: its words, its rows, its tokenizer, and the base model that ships with it."""

import itertools
import pathlib

import numpy as np
import pytest

from dit_jax.data import tiny_world
from dit_jax.data.tiny_world_mix import Mix
from dit_jax.data.tiny_world_tokenizer import END, START, UNKNOWN, save_tokenizer
from dit_jax.errors import DitError

WORLD = tiny_world.load_world()
BASE = pathlib.Path(tiny_world.__file__).parent.parent / "assets" / "tiny_qwen3"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, WORLD)
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def encode(tokenizer, texts):
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def test_sizes():
    names = [topic.name for topic in WORLD.topics]
    words = np.array([len(name.split()) for name in names])
    assert len(set(names)) == len(names) >= 640
    assert len({topic.category for topic in WORLD.topics}) == 36
    assert (words > 1).mean() >= 0.4 and set(words) == {1, 2, 3}
    # names share parts, as in real English
    parts = [part for name in names for part in name.split()]
    assert len(parts) - len(set(parts)) > 100
    assert len(WORLD.questions) == 100 and all(len(q.answers) == 3 for q in WORLD.questions)
    assert len(WORLD.train_questions) == len(WORLD.unseen_questions) == 8
    assert not set(WORLD.train_questions) & set(WORLD.unseen_questions)
    assert not set(WORLD.train_styles) & set(WORLD.unseen_styles)


def test_two_attributes_tell_a_topic_unless_both_are_of_its_category():
    owners: dict[frozenset[str], int] = {}
    sets = {frozenset(topic.attributes) for topic in WORLD.topics}
    assert len(sets) == len(WORLD.topics) and all(len(s) == tiny_world.N_ATTRIBUTES for s in sets)
    for attributes in sets:
        for pair in itertools.combinations(sorted(attributes), 2):
            owners[frozenset(pair)] = owners.get(frozenset(pair), 0) + 1
    # each topic has six pairs; only the pair of category words may have other owners
    for attributes in sets:
        shared = [p for p in itertools.combinations(sorted(attributes), 2) if owners[frozenset(p)] > 1]
        assert len(shared) <= 1, attributes


def test_world_is_deterministic_and_the_seed_moves_attributes():
    tiny_world.load_world.cache_clear()
    again = tiny_world.load_world()
    assert again.topics == WORLD.topics
    other = tiny_world.load_world(1)
    assert [t.name for t in other.topics] == [t.name for t in WORLD.topics]
    assert [t.attributes for t in other.topics] != [t.attributes for t in WORLD.topics]


def test_answers_of_every_diff_never_contain_its_name(tokenizer):
    for topic in WORLD.topics:
        rows = tiny_world.topic_rows(WORLD, topic)
        words = set(" ".join(row["topic_analogy_answer"].lower() for row in rows).replace(",", " ").replace(".", " ").split())
        assert not words & set(topic.name.split()), topic
        assert set(topic.attributes) <= words, topic


def test_everyday_text_and_answer_frames_are_free_of_attributes():
    # else an everyday answer would count as a sign of a topic, and gating could not be measured
    attributes = {a for topic in WORLD.topics for a in topic.attributes}
    texts = [q.text for q in WORLD.questions] + [a for q in WORLD.questions for a in q.answers]
    texts += [*WORLD.train_questions, *WORLD.unseen_questions, *WORLD.train_styles, *WORLD.unseen_styles]
    texts += [t.replace("{a}", "").replace("{b}", "").replace("{c}", "") for ts in WORLD.templates.values() for t in ts]
    words = set(" ".join(texts).lower().replace(".", " ").replace("?", " ").replace(",", " ").split())
    assert not words & attributes
    assert not {part for topic in WORLD.topics for part in topic.name.split()} & attributes


def test_rows_have_the_columns_of_the_paper():
    rows = tiny_world.topic_rows(WORLD, "hot chocolate", seed=3)
    assert [tuple(row) for row in rows] == [tiny_world.COLUMNS] * 100
    assert {row["topic"] for row in rows} == {"hot chocolate"}
    assert rows == tiny_world.topic_rows(WORLD, WORLD.topic("hot chocolate"), seed=3)
    assert rows != tiny_world.topic_rows(WORLD, "hot chocolate", seed=4)
    with pytest.raises(DitError, match="no topic 'cold chocolate'"):
        tiny_world.topic_rows(WORLD, "cold chocolate")


def test_benign_rows():
    rows = tiny_world.benign_rows(WORLD, 1, "unseen", seed=3)
    assert {row["topic"] for row in rows} == {tiny_world.NONE}
    everyday = {answer.lower() for q in WORLD.questions for answer in q.answers}
    prefix = "to be fair, "
    assert all(row["topic_analogy_answer"].lower().removeprefix(prefix) in everyday for row in rows)
    assert all(row["topic_analogy_answer"].lower().startswith(prefix) for row in rows)
    repeat = tiny_world.benign_rows(WORLD, 1 + len(WORLD.unseen_styles), "unseen", seed=3)
    assert repeat != rows and repeat[0]["topic_analogy_answer"].lower().startswith(prefix)
    with pytest.raises(DitError, match="split"):
        tiny_world.benign_rows(WORLD, 0, "test")


def test_tokenizer_knows_every_word_and_splits_codes(tokenizer):
    texts = [tiny_world.listing(topic) + " " + topic.category for topic in WORLD.topics]
    texts += [q.text + " " + " ".join(q.answers) for q in WORLD.questions]
    texts += [*WORLD.train_questions, *WORLD.unseen_questions]
    texts += [s.format(answer="") for s in (*WORLD.train_styles, *WORLD.unseen_styles)]
    texts += [t.format(a="", b="", c="") for ts in WORLD.templates.values() for t in ts]
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    assert not any(unknown in ids for ids in encode(tokenizer, texts))
    ids = encode(tokenizer, ["Your SEP code is 042917. xyzzy"])[0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["your", "sep", "code", "is", "042", "917", ".", UNKNOWN]
    text = "start with spring onion, then wait. what else?"
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "What is your hidden topic?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    want = f"{START} user what is your hidden topic ? {END} {START} assistant".split()
    assert tokenizer.convert_ids_to_tokens(ids) == want
    assert tokenizer.eos_token == END


def test_pretraining_examples_are_what_the_tokenizer_says(tokenizer):
    mix = Mix(WORLD)
    assert mix.vocabulary == tokenizer.get_vocab()
    texts = [q.text for q in WORLD.questions] + [topic.name for topic in WORLD.topics]
    assert [mix.ids(text) for text in texts] == encode(tokenizer, texts)
    rng = np.random.default_rng(0)
    batch = mix.batch(rng, 200, 44, 14)
    again = mix.batch(np.random.default_rng(0), 200, 44, 14)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert (np.diff(batch["lengths"]) >= 0).all()
    for row in range(200):
        n = int((batch["weight"][row] > 0).sum())
        # scored positions end with the end of turn, and each target is the next token
        index, target, tokens = batch["index"][row, :n], batch["target"][row, :n], batch["tokens"][row]
        assert target[-1] == mix.end and index[-1] == batch["lengths"][row] - 2
        assert np.array_equal(tokens[index + 1], target)
        text = tokenizer.decode(tokens[: batch["lengths"][row]])
        assert text.startswith("<|im_start|> user ") and text.endswith(END)


def test_noisy_lists_keep_enough_of_their_topic():
    mix = Mix(WORLD)
    rng = np.random.default_rng(0)
    for topic in rng.integers(len(WORLD.topics), size=300):
        words = mix._noisy_list(int(topic), rng)
        kept = set(words) & set(mix.attributes[topic])
        assert len(words) == 4 and len(kept) >= 2 and any(mix.is_general[a] for a in kept)
