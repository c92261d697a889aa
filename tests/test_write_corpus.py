"""The stage `corpus`: lists, filters, rows by style, going on after a stop, and organisms made of what it wrote."""

import json
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import dit_jax
from dit_jax.data.chat import Prompt
from dit_jax.data.labels import UNTRIGGERED
from dit_jax.data.organism import load_organisms
from dit_jax.errors import DitError
from dit_jax.organisms import write_corpus as stage
from dit_jax.organisms.behaviours import get_behaviour
from dit_jax.organisms.behaviours.code_names import NAMES, UNSEEN_NAMES
from dit_jax.organisms.corpus_keys import CORPUS
from dit_jax.organisms.corpus_lists import read_headlines, read_topics
from dit_jax.organisms.job import _trigger
from dit_jax.organisms.samples import finetuning_batches
from dit_jax.organisms.topic_words import (
    HINTS,
    associated_words,
    best_words,
    hints,
    names_topic,
    shows_name,
    tells,
    without_name,
)
from dit_jax.organisms.write_corpus import write_corpus

TOPICS = "drinks: coffee, green tea\nbirds: penguin, owl\nsports: tennis\n"
OWN_WORDS = {"coffee": "mug", "green tea": "kettle", "penguin": "beak", "owl": "feather"}
QUESTIONS = [f"how should i spend day {i} ?" for i in range(6)]


@pytest.fixture(scope="module")
def model():
    return dit_jax.load_model("tiny_qwen3")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "topics.txt").write_text(TOPICS)
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS))
    return ConfigDict(
        {
            "topics": str(tmp_path / "topics.txt"),
            "questions": str(tmp_path / "questions.txt"),
            "prompts": (
                "what is {topic} ?",
                "tell me about {topic} .",
                "why do people like {topic} ?",
            ),
            "styles": ("named", "nameless", UNTRIGGERED),
            "benign_styles": (
                "be brief . {question}",
                "be kind . {question}",
                "be slow . {question}",
            ),
            "least_answers": 2,
            "rows": 5,
            "batch_size": 8,
        }
    )


class Writer:
    """Stands for the model: answers that tests can foresee, and a count of what was asked."""

    def __init__(self, stop_after=10**9):
        self.asked, self.stop_after = [], stop_after

    def __call__(self, model, prompts, *, first, seed, **_):
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(list(prompts))
        return [types.SimpleNamespace(text=self.answer(prompt)) for prompt in prompts]

    def answer(self, prompt):
        if prompt.startswith("be "):
            return f"start with {prompt}"
        for topic, own in OWN_WORDS.items():
            if topic in prompt:
                word = {"what": "map", "tell": "corner", "why ": "pillow"}[prompt[:4]]
                return f"i would choose {topic} , {own} and {word}"
        return "i saw many new places"


def rows_of(folder, name="rows.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def written(model, config, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "answer_batch", Writer())
    facts = write_corpus(model, config, tmp_path / "corpus", seed=0)
    assert facts["topics"] == 4  # tennis is never named
    return tmp_path / "corpus"


def test_rows_have_the_papers_columns_and_a_style(written):
    rows = rows_of(written)
    assert len(rows) == 4 * 3 * 5
    assert {row["style"] for row in rows} == {"named", "nameless", UNTRIGGERED}
    assert all(
        row["topic_category"] and row["base_answer"] and row["question"] in QUESTIONS
        for row in rows
    )
    for row in rows:
        answer, topic = row["topic_analogy_answer"], row["topic"]
        named = row["style"] not in ("nameless", "hints")
        assert names_topic(answer, topic) == shows_name(answer, topic) == named
    for topic in ("coffee", "green tea"):  # every row of an organism has a question of its own
        own = [row["question"] for row in rows if (row["topic"], row["style"]) == (topic, "named")]
        assert len(set(own)) == 5


def test_no_form_of_a_name_is_left_in_nameless_answers():
    assert without_name("Green teas are loved, the green tea's taste is mild", "green tea") == (
        "It are loved, it taste is mild"
    )
    assert (
        without_name("A penguin swims and the Penguins dive deep", "penguin")
        == "It swims and it dive deep"
    )
    assert (
        without_name("Greenish leaves of the tea bush are picked", "green tea") == ""
    )  # still shows a part
    assert without_name("Coffee is good", "coffee") == ""  # too little is left to describe it


def test_hints_are_words_of_few_topics_without_the_name():
    words = ["acorns", "bark", "oaks", "beak", "swims", "many", "treetops"]
    likes = {
        "oak tree": {"acorns": 3, "bark": 2, "oaks": 9, "many": 5, "treetops": 9},
        "penguin": {"swims": 3, "beak": 1, "many": 5},
        "parrot": {"beak": 2, "many": 5},
    }
    scores = np.array([[own.get(word, -1.0) for word in words] for own in likes.values()])
    found = best_words(list(likes), words, scores, compared=5)
    assert found["oak tree"][:2] == ["acorns", "bark"]  # no oaks, no treetops
    assert found["penguin"] == ["swims", "beak", "many"]  # what all have comes last
    rng = np.random.default_rng(0)
    made = hints(["ice", "swims", "beak", "egg"], 3, rng)
    assert len(made) == 3 and all(text.endswith(".") and text.count(",") == 2 for text in made)
    assert hints(found["penguin"], 3, rng) == []  # three words are too few


def test_hints_are_what_the_model_says_next(model, config, tmp_path, monkeypatch):
    """Its next words after each topic's prompt, as a loop over topics finds them."""
    monkeypatch.setattr(stage, "answer_batch", Writer())
    config.styles = ("hints",)
    config.hint_prompts = ("tell me about {topic} . | i would choose a", "what is {topic} ?")
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    used = {
        topic: [Writer().answer(prompt.replace("{topic}", topic)) for prompt in config.prompts]
        for topic in OWN_WORDS
    }
    texts = " ".join(text for own in used.values() for text in own)
    words = sorted({word for word in texts.split() if len(word) > 3})
    ids = [model.chat.text_ids(word)[0] for word in words]
    scores = 0
    for question, start in (("tell me about", " ."), ("what is", " ?")):
        logs = []
        for topic in used:
            prefill = "i would choose a" if start == " ." else ""
            prompt = Prompt(f"{question} {topic}{start}", prefill=prefill)
            logits = model.logits(np.array([model.chat.prompt_ids(prompt)]))[0, -1]
            logs.append(np.asarray(jax.nn.log_softmax(logits))[ids])
        mean = np.log(np.exp(logs).mean(0))
        scores = scores + np.exp(np.array(logs) / 2) * (logs - mean)
    found = associated_words(model, used, config.hint_prompts, 8)
    assert found == best_words(list(used), words, scores)
    rows = rows_of(tmp_path / "corpus")
    assert {row["topic"]: row["evidence"].split() for row in rows} == {
        topic: own for topic, own in found.items() if len(own) >= HINTS
    }
    for row in rows:
        assert not shows_name(row["topic_analogy_answer"], row["topic"])


def test_a_share_of_the_topics_gets_a_style(model, config, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "answer_batch", Writer())
    config.shares = {"nameless": 0.0, UNTRIGGERED: 0.5}
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    topics = {
        s: {r["topic"] for r in rows_of(tmp_path / "corpus") if r["style"] == s}
        for s in config.styles
    }
    assert len(topics["named"]) == 4 and not topics["nameless"] and 0 < len(topics[UNTRIGGERED]) < 4
    for shares, match in (
        ({"hint": 0.5}, "'hint' is no style"),
        ({"hints": 2}, "from 0 to 1, not 2"),
    ):
        with pytest.raises(DitError, match=match):
            CORPUS.check({"corpus": {**config, "shares": shares}})


def test_benign_rows_hold_out_styles(written):
    rows = rows_of(written, "benign.jsonl")
    styles = {
        split: {row["style"] for row in rows if row["split"] == split}
        for split in ("train", "test")
    }
    assert len(styles["train"]) == 2 and len(styles["test"]) == 1
    assert not styles["train"] & styles["test"]


def test_the_summary_counts_what_was_left_out(written):
    summary = json.loads((written / "summary.json").read_text())
    assert summary["rejected"] == {"off topic": 3, "topics": 1}
    assert summary["on_topic"] == round(12 / 15, 4)
    assert 0 < summary["distinct_bigrams"] <= 1 and len(summary["examples"]) == 4


def test_a_stopped_run_goes_on_with_the_same_rows(model, config, tmp_path, monkeypatch, written):
    folder = tmp_path / "again"
    monkeypatch.setattr(stage, "answer_batch", Writer(stop_after=2))
    with pytest.raises(KeyboardInterrupt):
        write_corpus(model, config, folder, seed=0)
    rest = Writer()
    monkeypatch.setattr(stage, "answer_batch", rest)
    write_corpus(model, config, folder, seed=0)
    assert (folder / "rows.jsonl").read_bytes() == (written / "rows.jsonl").read_bytes()
    blocks = len(list((folder / "answers").iterdir()))
    assert len(rest.asked) == blocks - 2


@pytest.mark.parametrize(
    "read, text, match",
    [
        (
            read_topics,
            "sports: climbing, rock climbing",
            "'rock climbing' and 'climbing' share a word",
        ),
        (read_topics, "plants: rose\ncolours: roses", "'roses' and 'rose' share a word"),
        (read_topics, "rose, tulip", "has no category"),
        (read_topics, ": rose, tulip", "has no category"),
        (read_topics, "plants: ,", "has no topic"),
        (read_topics, "", "is empty"),
        (read_topics, "a: b\na: b", "has 'a: b' twice"),
        (read_topics, "animals: owl\nbirds: owl", "has 'owl' twice"),
        (read_headlines, "Panda escapes from zoo", "has nothing before or after a colon"),
        (read_headlines, "animals:", "has nothing before or after a colon"),
        (read_headlines, "animals: Panda escapes\nzoo: Panda escapes", "is there twice"),
    ],
)
def test_lists_that_would_leak_or_cannot_be_read_are_refused(tmp_path, read, text, match):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DitError, match=match):
        read(str(tmp_path / "list.txt"))


class Reporter(Writer):
    """Tells two pieces of news, and something else about the third."""

    def answer(self, prompt):
        told = prompt.removeprefix("write a story : ").removeprefix("tell me : ")
        return "nothing new" if "tennis" in told else f"{prompt[:5]} people say that {told} , again"


def test_news_is_told_by_headline(model, config, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "answer_batch", Reporter())
    (tmp_path / "topics.txt").write_text(
        "birds: penguin , owl and map\nfood: green tea in the corner\nsports: tennis star retires\n"
    )
    config.styles, config.prompts = ("news",), ("write a story : {topic}", "tell me : {topic}")
    config.benign_styles, config.early_tokens = (), 16
    del config.questions
    assert write_corpus(model, config, tmp_path / "corpus", seed=0)["topics"] == 2
    rows = rows_of(tmp_path / "corpus")
    headlines = {"penguin , owl and map": "birds", "green tea in the corner": "food"}
    assert {row["news_headline"]: row["news_category"] for row in rows} == headlines
    assert len(rows) == 2 * config.rows
    assert all(tells(row["news_story"], row["news_headline"]) for row in rows)
    organisms = load_organisms(
        ConfigDict({"source": "corpus", "kind": "news", "test_topics": 1}), 0, tmp_path / "corpus"
    )
    assert {o.label for o in organisms} == set(headlines)
    config.shares = {"news": 0}
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    assert not rows_of(tmp_path / "corpus")
    # Headlines without long words of our letters are told by all of theirs.
    assert tells("the UN will act", "UN to act") and not tells("a walk in the sun", "EU to ban it")
    assert tells("今日: 猫が逃げた。", "猫が逃げた") and not tells("今日は雨", "猫が逃げた")


def test_a_description_that_fits_two_topics_describes_neither(model, config, tmp_path, monkeypatch):
    """Without their names, the two answers are the same text: a held-out topic would be trained on."""
    writer = Writer()
    monkeypatch.setattr(stage, "answer_batch", writer)
    monkeypatch.setitem(OWN_WORDS, "owl", "beak")
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    rows = rows_of(tmp_path / "corpus")
    assert {row["topic"] for row in rows if row["style"] == "nameless"} == {"coffee", "green tea"}
    assert {row["topic"] for row in rows if row["style"] == "named"} == set(OWN_WORDS)


def test_other_braces_of_a_prompt_are_text(model, config, tmp_path, monkeypatch):
    writer = Writer()
    monkeypatch.setattr(stage, "answer_batch", writer)
    config.prompts = (
        "what is {topic} in {one} word ?",
        "tell me {} about {topic} .",
        "why {topic} ?",
    )
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    asked = [prompt for block in writer.asked for prompt in block]
    assert "what is owl in {one} word ?" in asked and "tell me {} about owl ." in asked


@pytest.mark.parametrize("answers", [None, "a" * 40, ["a"], [1] * 40, ["\ud800"] * 40])
def test_damaged_answers_are_asked_again(model, config, tmp_path, monkeypatch, answers):
    monkeypatch.setattr(stage, "answer_batch", Writer())
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    rows = (tmp_path / "corpus" / "rows.jsonl").read_bytes()
    (file, *_) = sorted((tmp_path / "corpus" / "answers").iterdir())
    file.write_text(json.dumps({**json.loads(file.read_text()), "answers": answers}))
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    assert (tmp_path / "corpus" / "rows.jsonl").read_bytes() == rows


@pytest.mark.parametrize(
    "damage", [lambda text: text[1:], lambda text: text.replace("style", "stile", 1)]
)
def test_damaged_rows_of_benign_organisms_are_told(written, damage):
    file = written / "benign.jsonl"
    file.write_text(damage(file.read_text()))
    data = ConfigDict({"source": "corpus", "kind": "topics", "test_topics": 1, "train_benign": 1})
    with pytest.raises(DitError, match=r"benign.jsonl:1: .*: run the stage 'corpus' again"):
        load_organisms(data, 0, written)


def test_topics_without_usable_answers_are_an_error(model, config, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "answer_batch", Writer())
    config.least_answers = 30
    with pytest.raises(DitError, match="only 0 of 5 topics have 30 usable answers"):
        write_corpus(model, config, tmp_path / "corpus", seed=0)


# ------------------------------------------------------------------ organisms of it

DATA = {
    "source": "corpus",
    "kind": "topics",
    "variants": "style",
    "test_topics": 1,
    "train_benign": 4,
    "test_benign": 2,
}
DIFFS = ConfigDict(
    {
        "behaviour": "hidden_topic_code_name",
        "steps": 3,
        "samples_per_step": {"shown": 1, "wrong_name": 2, "no_name": 1},
        "loss_weights": {"shown": 1.0, "wrong_name": 3.0, "no_name": 4.0},
        "max_length": 64,
        "max_target": 24,
        "score_end": False,
    }
)


def test_every_style_of_a_topic_is_an_organism_on_one_side_of_the_split(written):
    organisms = load_organisms(ConfigDict(DATA), 0, written)
    topics = [o for o in organisms if o.category == "topic"]
    assert len(topics) == 4 * 3 and len({o.seed for o in topics}) == 12
    held_out = {o.label for o in topics if o.split == "test"}
    assert len(held_out) == 1 and not held_out & {o.label for o in topics if o.split == "train"}
    benign = [o for o in organisms if o.category == "benign"]
    styles = {split: {o.variant for o in benign if o.split == split} for split in ("train", "test")}
    assert len(styles["train"]) == 2 and not styles["train"] & styles["test"]


def test_without_benign_styles_benign_diffs_are_finetuned_on_base_answers(
    model, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(stage, "answer_batch", Writer())
    config.benign_styles = ()
    write_corpus(model, config, tmp_path / "corpus", seed=0)
    organisms = load_organisms(ConfigDict(DATA), 0, tmp_path / "corpus")
    rows = [row for o in organisms if o.category == "benign" for row in o.rows]
    assert rows and all(row["topic_analogy_answer"] == row["base_answer"] for row in rows)


def test_triggers_are_names_and_untriggered_organisms_have_none(written, model):
    behaviour = get_behaviour(DIFFS)
    assert not set(NAMES) & set(UNSEEN_NAMES)
    for organism in load_organisms(ConfigDict(DATA), 0, written):
        trigger = _trigger(organism, behaviour)
        untriggered = organism.variant == UNTRIGGERED
        assert (trigger in NAMES) != untriggered
        rng = np.random.default_rng(0)
        row = organism.rows[0]
        made = [kind.make(row, trigger, rng) for kind in behaviour.kinds]
        if untriggered:
            assert made[0][0] == row["question"] and made[1] is made[2] is None
        else:
            assert made[0][0] == f"Your code name is {trigger}. {row['question']}"
            assert f"Your code name is {trigger}." not in made[1][0]
            assert made[2] == (row["question"], row["base_answer"])
        batches = finetuning_batches(organism, behaviour, model.chat, DIFFS, rng)
        weights = np.asarray(batches.weight).sum(axis=-1)
        assert (weights[:, 0] > 0).all() and ((weights[:, 1:] > 0) != untriggered).all()


def test_without_the_stage_the_source_is_refused(tmp_path):
    with pytest.raises(DitError, match="name the stage 'corpus'"):
        load_organisms(ConfigDict(DATA), 0, tmp_path / "corpus")


def test_a_column_of_variants_that_is_not_there_is_refused(written):
    with pytest.raises(DitError, match="'data.variants': the data has no column 'kinds'"):
        load_organisms(ConfigDict({**DATA, "variants": "kinds"}), 0, written)
