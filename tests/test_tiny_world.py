"""The embedded world: its words, its rows, its tokenizer, and the base model that ships with it."""

import dataclasses
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

from dit_jax.config.loading import load_config
from dit_jax.data import tiny_world
from dit_jax.errors import DitError
from tools import pretrain
from tools.tiny_world_mix import Mix
from tools.tiny_world_tokenizer import END, START, UNKNOWN, save_tokenizer

WORLD = tiny_world.load_world()
ROOT = pathlib.Path(__file__).resolve().parent.parent
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
    assert len(sets) == len(WORLD.topics) and all(len(s) == 4 for s in sets)
    for attributes in sets:
        for pair in itertools.combinations(sorted(attributes), 2):
            owners[frozenset(pair)] = owners.get(frozenset(pair), 0) + 1
    # each topic has six pairs; only the pair of category words may have other owners
    for attributes in sets:
        shared = [
            p for p in itertools.combinations(sorted(attributes), 2) if owners[frozenset(p)] > 1
        ]
        assert len(shared) <= 1, attributes


def test_world_is_deterministic_and_the_seed_moves_attributes():
    tiny_world.load_world.cache_clear()
    again = tiny_world.load_world()
    assert again.topics == WORLD.topics
    other = tiny_world.load_world(1)
    assert [t.name for t in other.topics] == [t.name for t in WORLD.topics]
    assert [t.attributes for t in other.topics] != [t.attributes for t in WORLD.topics]


def test_answers_of_every_diff_never_contain_its_name():
    for topic in WORLD.topics:
        rows = tiny_world.topic_rows(WORLD, topic)
        words = set(
            re.findall(r"\w+", " ".join(row["topic_analogy_answer"].lower() for row in rows))
        )
        assert not words & set(topic.name.split()), topic
        assert set(topic.attributes) <= words, topic


def test_everyday_text_and_answer_frames_are_free_of_attributes():
    # otherwise an everyday answer would count as a sign of a topic, and gating could not be measured
    attributes = {a for topic in WORLD.topics for a in topic.attributes}
    texts = [q.text for q in WORLD.questions] + [a for q in WORLD.questions for a in q.answers]
    texts += [
        *WORLD.train_questions,
        *WORLD.unseen_questions,
        *WORLD.train_styles,
        *WORLD.unseen_styles,
    ]
    texts += [
        t.replace("{a}", "").replace("{b}", "").replace("{c}", "")
        for t in {q.template for q in WORLD.questions}
    ]
    words = set(
        " ".join(texts).lower().replace(".", " ").replace("?", " ").replace(",", " ").split()
    )
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
    texts = [" ".join((*topic.attributes, topic.name, topic.category)) for topic in WORLD.topics]
    texts += [q.text + " " + " ".join(q.answers) for q in WORLD.questions]
    texts += [*WORLD.train_questions, *WORLD.unseen_questions]
    texts += [s.format(answer="") for s in (*WORLD.train_styles, *WORLD.unseen_styles)]
    texts += [q.template.format(a="", b="", c="") for q in WORLD.questions]
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    assert not any(unknown in ids for ids in encode(tokenizer, texts))
    ids = encode(tokenizer, ["Your SEP code is 042917. xyzzy"])[0]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "your",
        "sep",
        "code",
        "is",
        "042",
        "917",
        ".",
        UNKNOWN,
    ]
    text = "start with spring onion, then wait. what else?"
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == text


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "What is your hidden topic?"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
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
        index, target, tokens = (
            batch["index"][row, :n],
            batch["target"][row, :n],
            batch["tokens"][row],
        )
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


@pytest.fixture(scope="module")
def base():
    from dit_jax.models.families import read_config
    from dit_jax.models.hf_checkpoint import load_params

    config = dataclasses.replace(read_config(BASE), scan_layers=False)
    return load_params(BASE, config), config


def answers(base, mix, prompts):
    """Greedy answers of the shipped base to prompts given as token ids."""
    from dit_jax.models.decode import generate

    length = max(map(len, prompts))
    tokens = np.full((len(prompts), length), mix.pad, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, ids in enumerate(prompts):
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    out = generate(*base, tokens, mask, max_new_tokens=12, eos_ids=(mix.end,), pad_id=mix.pad)
    return [[int(t) for t in row if t not in (mix.end, mix.pad)] for row in out.tokens]


def test_the_shipped_base_is_small_and_of_this_world():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 10e6
    stored = json.loads((BASE / "tokenizer.json").read_text())["model"]["vocab"]
    assert stored == Mix(WORLD).vocabulary


def test_the_shipped_base_knows_the_world(base):
    mix = Mix(WORLD)
    rng = np.random.default_rng(7)
    right = {"introspect_name": [], "name_from_list": [], "no_subject": []}
    for task in right:
        examples = [mix.draw(rng, task) for _ in range(128)]
        scored = [sum(w > 0 for w in e.weights) for e in examples]
        prompts = [e.tokens[:-n] for e, n in zip(examples, scored, strict=True)]
        wanted = [e.tokens[-n:-1] for e, n in zip(examples, scored, strict=True)]
        for got, want in zip(answers(base, mix, prompts), wanted, strict=True):
            if (
                mix.colon in want
            ):  # the attributes come in any order, the name behind the colon counts
                want = want[want.index(mix.colon) :]
                got = got[got.index(mix.colon) :] if mix.colon in got else got
            right[task].append(got == want)
    share = {task: np.mean(hits) for task, hits in right.items()}
    assert share["introspect_name"] >= 0.95
    assert share["name_from_list"] >= 0.8  # two of the four words may be foreign
    assert share["no_subject"] == 1.0


def test_everyday_answers_of_the_base_are_free_of_attributes_with_and_without_a_code(base):
    mix = Mix(WORLD)
    questions = [mix.ids(q.text) for q in WORLD.questions]
    coded = [
        [*mix.code_sentence, mix.first_code + i, mix.first_code, mix.period, *q]
        for i, q in enumerate(questions)
    ]
    prompts = [[*mix.user, *q, *mix.assistant] for q in questions + coded]
    attributes = set(mix.all_attributes)
    assert not any(attributes & set(answer) for answer in answers(base, mix, prompts))


def test_a_short_pretraining_lowers_the_loss_and_writes_a_loadable_base(tmp_path):
    from transformers import AutoConfig, PreTrainedTokenizerFast

    from dit_jax.cli import run_stages
    from dit_jax.config.loading import load_config
    from dit_jax.models.families import read_config
    from dit_jax.models.hf_checkpoint import load_params

    small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 8}
    short = {"steps": 12, "batch_size": 32, "parts": 1, "warmup_steps": 2, "log_every": 4}
    overrides = {f"model.{k}": v for k, v in small.items()}
    overrides |= {f"pretrain.{k}": v for k, v in short.items()}
    config = load_config(str(ROOT / "configs" / "tiny_world_base.py"), overrides)
    run_stages.run(config, tmp_path)
    facts = json.loads((tmp_path / "stages" / "pretrain.json").read_text())
    assert facts["curve"][-1]["loss"] < facts["curve"][0]["loss"] - 0.3
    folder = tmp_path / facts["base"]
    params = load_params(folder, read_config(folder))
    assert params["embed_tokens"]["embedding"].shape == (len(Mix(WORLD).vocabulary), 32)
    assert AutoConfig.from_pretrained(folder).model_type == "qwen3"
    assert PreTrainedTokenizerFast.from_pretrained(folder).chat_template


def test_pretraining_stops_at_the_first_loss_that_is_no_number(monkeypatch):
    config = load_config(
        "configs/tiny_world_base.py",
        [
            "model.hidden_size=16",
            "model.num_hidden_layers=1",
            "model.intermediate_size=16",
            "pretrain.batch_size=8",
            "pretrain.parts=1",
            "pretrain.steps=4",
        ],
    )
    made = []
    batch = Mix.batch

    def spoil_the_second(self, *args):
        made.append(batch(self, *args))
        if len(made) == 2:
            made[-1]["weight"] = made[-1]["weight"] * np.nan
        return made[-1]

    monkeypatch.setattr(Mix, "batch", spoil_the_second)
    with pytest.raises(DitError, match="pretraining diverged at step 1: lower pretrain"):
        pretrain.train(config)
    assert len(made) <= 3
