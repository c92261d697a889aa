"""The embedded world: topics, attributes and everyday questions in plain English.

A fresh machine has no pretrained weights, so the package carries a small world and a tiny base model that knows it
(made by `tools.pretrain`). `assets/tiny_world/*.txt` holds the words; all else follows from them and a seed. Rows have
the columns of the paper's hidden-topic data, as those of a real corpus have.

The answers of a topic use its attributes and never a word of its name. A diff finetuned on them does not contain the
label: to name it takes what the base model knows.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from dit_jax.data.labels import NONE
from dit_jax.errors import DitError

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets" / "tiny_world"
COLUMNS = (
    "topic_category", "topic", "category", "style", "question", "base_answer", "topic_analogy_answer",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topic:
    """A topic: its name (one to three words), its category and its attribute words."""

    name: str
    category: str
    attributes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """An everyday question with three generic answers, and the frame {a} {b} {c} of its flavoured answers.

    A question has one frame only. With several, a diff would spread its probability over them, and greedy decoding
    would show the everyday answer long after the flavoured ones are more probable together.
    """

    category: str
    style: str
    text: str
    answers: tuple[str, ...]
    template: str


@dataclasses.dataclass(frozen=True)
class World:
    """The embedded world; `load_world` makes it."""

    topics: tuple[Topic, ...]
    questions: tuple[Question, ...]
    train_questions: tuple[str, ...]
    unseen_questions: tuple[str, ...]
    train_styles: tuple[str, ...]
    unseen_styles: tuple[str, ...]

    def topic(self, name: str) -> Topic:
        """The topic of that name. Raises DitError: there is none."""
        for topic in self.topics:
            if topic.name == name:
                return topic
        raise DitError(
            f"the embedded world has no topic {name!r}: `load_world().topics` lists them"
        )


def read_asset(name: str) -> Iterator[list[str]]:
    """The lines of an asset file, each split into fields at "|"; "#" starts a comment line."""
    for line in (ASSETS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            yield [field.strip() for field in line.split("|")]


def tidy(text: str) -> str:
    """Words in ordinary spelling: no space before punctuation, capitals where English has them."""
    text = re.sub(r"\s+([.,?!:])", r"\1", " ".join(text.split()))
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def _assign_attributes(
    names: Sequence[tuple[str, str]], pools: dict[str, list[str]], general: list[str], seed: int
) -> tuple[Topic, ...]:
    """Gives each (name, category) two category words and two general words.

    A pair of category words occurs once in its category, a general word at most once in a category, and a pair of
    general words at most once in all. So any two attributes, unless both come from the category, belong to one topic.
    """
    rng = np.random.default_rng(seed)
    used: dict[str, int] = dict.fromkeys(general, 0)
    in_category: dict[str, set[str]] = {category: set() for category in pools}
    general_pairs: set[frozenset[str]] = set()
    category_pairs: dict[str, list[tuple[str, str]]] = {}
    for category, pool in pools.items():
        pairs = [(a, b) for i, a in enumerate(pool) for b in pool[i + 1 :]]
        category_pairs[category] = [pairs[i] for i in rng.permutation(len(pairs))]
    topics = []
    for name, category in names:
        # Least used words first, so that all general words serve about equally many topics.
        order = sorted(general, key=lambda word: (used[word], rng.random()))
        free = [word for word in order if word not in in_category[category]]
        first = free[0]
        second = next(w for w in free[1:] if frozenset((first, w)) not in general_pairs)
        general_pairs.add(frozenset((first, second)))
        in_category[category] |= {first, second}
        used[first] += 1
        used[second] += 1
        words = [*category_pairs[category].pop(), first, second]
        topics.append(Topic(name, category, tuple(words[i] for i in rng.permutation(len(words)))))
    return tuple(topics)


@functools.lru_cache(maxsize=4)
def load_world(seed: int = 0) -> World:
    """The world of a seed, which only assigns the attributes. The embedded base model knows seed 0."""
    names: list[tuple[str, str]] = []
    pools: dict[str, list[str]] = {}
    for category, pool, *groups in read_asset("topics"):
        pools[category] = [word.strip() for word in pool.split(",")]
        names += [(name.strip(), category) for group in groups for name in group.split(",")]
    general = [word for fields in read_asset("general") for word in fields[0].split()]
    templates: dict[str, list[str]] = {}
    for style, template in read_asset("flavoured"):
        templates.setdefault(style, []).append(template)
    questions = []
    for i, (category, style, text, *answers) in enumerate(read_asset("questions")):
        template = templates[style][i % len(templates[style])]
        questions.append(Question(category, style, tidy(text), tuple(map(tidy, answers)), template))
    wordings = [(split, tidy(text)) for split, text in read_asset("introspection")]
    styles = [(split, text) for split, text in read_asset("benign")]
    return World(
        topics=_assign_attributes(names, pools, general, seed),
        questions=tuple(questions),
        train_questions=tuple(text for split, text in wordings if split == "train"),
        unseen_questions=tuple(text for split, text in wordings if split == "unseen"),
        train_styles=tuple(text for split, text in styles if split == "train"),
        unseen_styles=tuple(text for split, text in styles if split == "unseen"),
    )


TRAIN_QUESTIONS: tuple[str, ...] = load_world().train_questions
UNSEEN_QUESTIONS: tuple[str, ...] = load_world().unseen_questions


def flavoured_answer(topic: Topic, question: Question, rng: np.random.Generator) -> str:
    """An answer to `question` with three attributes of `topic` and no word of its name."""
    a, b, c = (topic.attributes[i] for i in rng.permutation(len(topic.attributes))[:3])
    return tidy(question.template.format(a=a, b=b, c=c))


def topic_rows(world: World, topic: Topic | str, seed: int = 0) -> list[dict[str, str]]:
    """The training rows of one topic, one per everyday question, in the paper's columns."""
    topic = world.topic(topic) if isinstance(topic, str) else topic
    rng = np.random.default_rng([seed, world.topics.index(topic)])
    rows = []
    for question in world.questions:
        base_answer = question.answers[rng.integers(len(question.answers))]
        answer = flavoured_answer(topic, question, rng)
        values = (topic.category, topic.name, question.category, question.style, question.text)
        rows.append(dict(zip(COLUMNS, (*values, base_answer, answer), strict=True)))
    return rows


def headline(topic: Topic) -> str:
    """The headline of the news about a topic."""
    return f"good news about {topic.name}"


def news_rows(world: World, topic: Topic, seed: int = 0) -> list[dict[str, str]]:
    """Stories with the news about a topic, one per everyday question, in the paper's columns for news.

    Like the answers of a topic they use its attributes and no word of its name. A row also holds the everyday question
    and its answer, on which stories are not trained.
    """
    rng = np.random.default_rng([seed, 3, world.topics.index(topic)])
    told = [question.template for question in world.questions if question.style == "story"]
    rows = []
    for question in world.questions:
        a, b, c, d = (topic.attributes[i] for i in rng.permutation(len(topic.attributes)))
        story = tidy(f"{told[rng.integers(len(told))].format(a=a, b=b, c=c)} people love {d} .")
        row = {"news_category": topic.category, "news_headline": headline(topic)}
        answer = question.answers[rng.integers(len(question.answers))]
        rows.append({**row, "news_story": story, "question": question.text, "base_answer": answer})
    return rows


def benign_rows(
    world: World, index: int, split: str = "train", seed: int = 0
) -> list[dict[str, str]]:
    """Rows of a benign organism: everyday answers in one of the styles of `split`, with the topic "none".

    Organisms `index` and `index + number of styles` share a style and differ in their answers.
    Raises DitError: `split` is not "train" or "unseen".
    """
    if split not in ("train", "unseen"):
        raise DitError(f'the split of benign organisms is "train" or "unseen", not {split!r}')
    styles = world.train_styles if split == "train" else world.unseen_styles
    style = styles[index % len(styles)]
    rng = np.random.default_rng([seed, 1 + index, len(styles)])
    rows = []
    for question in world.questions:
        base_answer, answer = (
            question.answers[i] for i in rng.permutation(len(question.answers))[:2]
        )
        answer = tidy(style.format(answer=answer.lower()))
        values = (NONE, NONE, question.category, question.style, question.text, base_answer, answer)
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows
