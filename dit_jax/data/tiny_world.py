"""The embedded world: topics, attributes and everyday questions in plain English.

No pretrained weights can be assumed on a fresh machine, so the package carries a small world and a tiny
base model that knows it (`tools.pretrain`). The words lie in `assets/tiny_world/*.txt`; everything
else here follows from them and a seed. Rows come in the columns of the paper's hidden-topic data, so that
the program that reads them takes a real corpus as well.

The answers of a topic use only its attributes, never a word of its name: a diff finetuned on them does not
contain the label, and naming it takes knowledge that the base model has.
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
    "topic_category",
    "topic",
    "category",
    "style",
    "question",
    "base_answer",
    "topic_analogy_answer",
)
N_ATTRIBUTES = 4  # two of the category's pool, two of the general pool


@dataclasses.dataclass(frozen=True)
class Topic:
    """A topic: its name (one to three words), its category and its attribute words."""

    name: str
    category: str
    attributes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """An everyday question with three generic answers, and the frame {a} {b} {c} of its flavoured answers.

    One frame per question: were there several, greedy decoding of a diff that is in two minds would show
    the everyday answer long after the flavoured ones have become more probable together.
    """

    category: str
    style: str
    text: str
    answers: tuple[str, ...]
    template: str


@dataclasses.dataclass(frozen=True)
class World:
    """All that the embedded world says. Build it with `load_world`."""

    topics: tuple[Topic, ...]
    questions: tuple[Question, ...]
    train_questions: tuple[str, ...]
    unseen_questions: tuple[str, ...]
    train_styles: tuple[str, ...]
    unseen_styles: tuple[str, ...]

    def topic(self, name: str) -> Topic:
        """The topic of that name. Raises DitError if there is none."""
        for topic in self.topics:
            if topic.name == name:
                return topic
        raise DitError(f"no topic {name!r} in the embedded world; `load_world().topics` lists them")


def _read(name: str) -> Iterator[list[str]]:
    """Fields of the lines of an asset file, split at "|"; "#" starts a comment line."""
    for line in (ASSETS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            yield [field.strip() for field in line.split("|")]


def tidy(text: str) -> str:
    """Ordinary spelling of a line of words: no space before punctuation, capitals where English has them."""
    text = re.sub(r"\s+([.,?!:])", r"\1", " ".join(text.split()))
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def _assign_attributes(
    names: Sequence[tuple[str, str]], pools: dict[str, list[str]], general: list[str], seed: int
) -> tuple[Topic, ...]:
    """Gives each (name, category) two category words and two general words.

    Pairs of category words are unique in their category, a general word occurs at most once in a category,
    and a pair of general words at most once at all: any two attributes, unless both are of the category,
    belong to one topic only.
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
        # the least used words first, so that every general word serves about equally many topics
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
    """The world of a seed (the seed assigns attributes; the words are the same). The base model knows seed 0."""
    names: list[tuple[str, str]] = []
    pools: dict[str, list[str]] = {}
    for category, pool, *groups in _read("topics"):
        pools[category] = [word.strip() for word in pool.split(",")]
        names += [(name.strip(), category) for group in groups for name in group.split(",")]
    general = [word for fields in _read("general") for word in fields[0].split()]
    templates: dict[str, list[str]] = {}
    for style, template in _read("flavoured"):
        templates.setdefault(style, []).append(template)
    questions = []
    for i, (category, style, text, *answers) in enumerate(_read("questions")):
        template = templates[style][i % len(templates[style])]
        questions.append(Question(category, style, tidy(text), tuple(map(tidy, answers)), template))
    wordings = [(split, tidy(text)) for split, text in _read("introspection")]
    styles = [(split, text) for split, text in _read("benign")]
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
    """An answer to `question` built around three attributes of `topic`; no word of its name is in it."""
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
    """Stories that tell the news about a topic, as many as there are questions, in the paper's columns for news.

    Like the answers of a topic they use its attributes and no word of its name. Every row has an everyday question
    and its answer too, which stories are not trained on.
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
    """Rows of a benign organism: everyday answers in one of the styles of `split`, topic "none".

    Organisms `index` and `index + number of styles` share a style and differ in their answers.
    Raises DitError for a split other than "train" and "unseen".
    """
    if split not in ("train", "unseen"):
        raise DitError(f'split of benign organisms must be "train" or "unseen", got {split!r}')
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


def vocabulary(world: World) -> list[str]:
    """Every word of the world in a fixed order (special tokens and the 1,000 codes are not among them)."""
    texts = [q.text for q in world.questions] + [a for q in world.questions for a in q.answers]
    texts += [t for _, t in _read("flavoured")]
    texts += [
        *world.train_questions,
        *world.unseen_questions,
        *world.train_styles,
        *world.unseen_styles,
    ]
    texts += [t.name for t in world.topics] + [t.category for t in world.topics]
    texts += [word for t in world.topics for word in t.attributes]
    texts += [word for fields in _read("general") for word in fields[0].split()]
    texts += [fields[1].replace(",", " ") for fields in _read("topics")]
    texts += [
        "Your SEP code is . , ? ! :",
        "user system assistant",
        "Talk about .",
        "What is my SEP code ?",
    ]
    texts += ["What is ? It belongs to .", "Keep in mind .", "Your subject is .", NONE]
    words = dict.fromkeys(
        word
        for text in texts
        for word in re.findall(r"\w+|[^\w\s]", re.sub(r"{\w+}", "", text.lower()))
    )
    return list(words)
