"""The stage `corpus`: the base model writes the rows that organisms are finetuned on, about topics of a list.

WORKDIR/corpus/answers/     what the model said, a file for each batch: a run that was stopped goes on after them
WORKDIR/corpus/rows.jsonl   rows in the paper's columns, of topics or of news; `style` tells the kinds of organisms of
                            a topic apart
WORKDIR/corpus/benign.jsonl rows of benign organisms, by style and split
WORKDIR/corpus/summary.json how many answers were usable, and why others were not
"""

import collections
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.api import Model
from dit_jax.asking import answer_batch
from dit_jax.config.loading import to_dict
from dit_jax.data.data_keys import BENIGN, ROWS
from dit_jax.data.labels import UNTRIGGERED, normalise
from dit_jax.data.organism import stable_seed
from dit_jax.errors import DitError
from dit_jax.formats.files import is_decoded
from dit_jax.formats.json_shape import fits, is_text
from dit_jax.organisms.corpus_keys import CORPUS, NEWS
from dit_jax.organisms.corpus_lists import read_lists
from dit_jax.organisms.topic_words import (
    associated_words,
    descriptions,
    hints,
    names_topic,
    tells,
)
from dit_jax.runtime import artifacts, processes
from dit_jax.runtime.outgoing import json_text
from dit_jax.runtime.progress import Progress

CORPUS_FORMAT = "dit_jax.corpus"
_MOST_REPEATS = 3  # a word may stand this often in an answer
_EXAMPLES = 6


def write_corpus(model: Model, config: Any, folder: Path, seed: int) -> dict[str, Any]:
    """Asks the model for answers and writes the rows; goes on where an earlier call stopped.

    Args:
        config: the `corpus` section of the config.

    Returns:
        Facts for the record of the stage.

    Raises:
        DitError: a list is missing or malformed, or too few topics have usable answers.
    """
    get = functools.partial(CORPUS.get, config)
    topics, questions = read_lists(config)
    if most := get("max_topics"):
        names = sorted(topics)
        order = np.random.default_rng([seed, 12]).permutation(len(names))[:most]
        topics = {names[i]: topics[names[i]] for i in order}
    about = [prompt for prompt in get("prompts") for _ in range(get("repeats"))]
    prompts = [prompt.replace("{topic}", topic) for topic in topics for prompt in about]
    styled = [style.replace("{question}", q) for style in get("benign_styles") for q in questions]
    said = _ask(model, [*questions, *prompts, *styled], len(questions), config, folder, seed)
    base = [_cut(model, text, get("base_tokens")) for text in said[: len(questions)]]
    plain = dict(zip(questions, base, strict=True))
    of_topics = said[len(questions) : len(questions) + len(prompts)]
    rejected: collections.Counter[str] = collections.Counter()
    used: dict[str, list[str]] = {}
    for number, topic in enumerate(topics):
        own = of_topics[number * len(about) : (number + 1) * len(about)]
        usable = list(dict.fromkeys(_usable(model, own, topic, config, rejected)))
        if len(usable) >= get("least_answers"):
            used[topic] = usable
        else:
            rejected["topics"] += 1
    if len(used) < 2:
        raise DitError(
            f"only {len(used)} of {len(topics)} topics have {get('least_answers')} usable answers: lower "
            "corpus.least_answers, or ask in other words (corpus.prompts)"
        )
    if NEWS in get("styles"):
        rows = list(_news_rows(model, topics, used, config, seed))
    else:
        rows = list(_topic_rows(model, topics, used, plain, config, seed))
    benign = list(_benign(model, questions, said[len(questions) + len(prompts) :], plain, config))
    summary = _summary(topics, of_topics, used, rejected)

    def publish() -> None:
        for name, written in ((ROWS, rows), (BENIGN, benign)):
            lines = (json_text(row) for row in written)
            artifacts.write_text(folder / name, "".join(f"{line}\n" for line in lines))
        artifacts.write_json(folder / "summary.json", summary)
        artifacts.write_manifest(folder, CORPUS_FORMAT, base=model.digest(), config=to_dict(config))

    processes.on_main(publish)
    return {"topics": len(used), "rows": len(rows), "on_topic": summary["on_topic"]}


def _ask(
    model: Model, prompts: Sequence[str], greedy: int, config: Any, folder: Path, seed: int
) -> list[str]:
    """The model's answers in the order of the prompts; the first `greedy` of them without sampling."""
    size, answers = CORPUS.get(config, "batch_size"), []
    blocks = [prompts[:greedy], *(prompts[i : i + size] for i in range(greedy, len(prompts), size))]
    with Progress("corpus", len(prompts)) as progress:
        for number, block in enumerate(blocks):
            if not block:  # news has no everyday questions
                continue
            path = folder / "answers" / f"{number:05d}.json"
            kept = (
                artifacts.read_json(path, "delete it") if processes.agree(path.exists()) else None
            )
            # A folder of answers may be a stranger's.
            answered = [lambda x: is_text(x) and is_decoded(x)] * len(block)
            if kept is None or not (
                fits(kept, {"prompts": [is_text], "answers": tuple(answered)})
                and kept["prompts"] == list(block)
            ):
                found = answer_batch(
                    model,
                    block,
                    max_new_tokens=CORPUS.get(config, "max_new_tokens"),
                    batch_size=size,
                    temperature=CORPUS.get(config, "temperature") if number else 0.0,
                    seed=seed,
                    first=number * size,
                )
                kept = {"prompts": list(block), "answers": [answer.text for answer in found]}
                processes.on_main(functools.partial(_keep, path, kept))
            answers += kept["answers"]
            progress.advance(len(block))
    return answers


def _keep(path: Path, answers: dict[str, Any]) -> None:
    artifacts.make_dir(path.parent)
    artifacts.write_json(path, answers)


def _cut(model: Model, text: str, tokens: int) -> str:
    """The first tokens of a text, as text."""
    return model.chat.tokenizer.decode(list(model.chat.text_ids(text)[:tokens])).strip()


def _usable(
    model: Model,
    answers: Sequence[str],
    topic: str,
    config: Any,
    rejected: collections.Counter[str],
) -> Iterator[str]:
    """The answers that name their topic early, or tell their news, and do not repeat themselves, cut to the length of a
    target."""
    for text in answers:
        cut = _cut(model, text, CORPUS.get(config, "answer_tokens"))
        words = collections.Counter(normalise(cut).split())
        early = _cut(model, text, CORPUS.get(config, "early_tokens"))
        if not (tells if NEWS in CORPUS.get(config, "styles") else names_topic)(early, topic):
            rejected["off topic"] += 1
        elif words and max(words.values()) > _MOST_REPEATS:
            rejected["repetition"] += 1
        elif sum(words.values()) < 4:
            rejected["too short"] += 1
        else:
            yield cut


def _targets(
    used: Mapping[str, Sequence[str]], words: Mapping[str, Sequence[str]], count: int, seed: int
) -> dict[str, Mapping[str, Sequence[str]]]:
    """The answers of each style, by topic."""
    return {
        "named": used,
        UNTRIGGERED: used,
        "nameless": descriptions(used),
        "hints": {topic: hints(own, count, _rng(seed, 14, topic)) for topic, own in words.items()},
    }


def _rng(seed: int, purpose: int, *names: str) -> np.random.Generator:
    return np.random.default_rng([seed, purpose, stable_seed(*names)])


def _pair(
    questions: Sequence[str], answers: Sequence[str], count: int, seed: int, topic: str, style: str
) -> Iterator[tuple[str, str]]:
    """(question, answer) of so many rows: questions in a random order, answers in turn."""
    rng = _rng(seed, 11, topic, style)
    order = rng.permutation(len(questions))
    for i in range(count if answers else 0):
        yield questions[order[i % len(order)]], answers[i % len(answers)]


def _row(
    model: Model,
    topic: str,
    category: str,
    style: str,
    question: str,
    answer: str,
    base: Mapping[str, str],
) -> dict[str, str]:
    return {
        "topic_category": category,
        "topic": topic,
        "category": "",
        "style": style,
        "question": question,
        "base_answer": base[question],
        "base_answer_model_id": Path(model.name).name,
        "topic_analogy_answer": answer,
        "topic_analogy_answer_model_id": Path(model.name).name,
    }


def _topic_rows(
    model: Model,
    topics: Mapping[str, str],
    used: Mapping[str, Sequence[str]],
    base: Mapping[str, str],
    config: Any,
    seed: int,
) -> Iterator[dict[str, str]]:
    """The rows of each style of each topic. used: its answers; base: the base's, by question."""
    get = functools.partial(CORPUS.get, config)
    words: dict[str, list[str]] = {}
    if "hints" in get("styles"):
        words = associated_words(model, used, get("hint_prompts"), get("batch_size"))
    count = get("rows")
    of_style = _targets(used, words, count, seed)
    for topic, style in itertools.product(used, get("styles")):
        if _gets(topic, style, config, seed):
            targets, evidence = of_style[style][topic], words[topic] if style == "hints" else ()
            for question, answer in _pair(list(base), targets, count, seed, topic, style):
                row = _row(model, topic, topics[topic], style, question, answer, base)
                yield row | {"evidence": " ".join(evidence)}


def _gets(topic: str, style: str, config: Any, seed: int) -> bool:
    """Whether a topic is in the share of topics that get a style."""
    share = dict(CORPUS.get(config, "shares")).get(style, 1)
    return bool(_rng(seed, 13, topic, style).random() < share)


def _news_rows(
    model: Model,
    categories: Mapping[str, str],
    used: Mapping[str, Sequence[str]],
    config: Any,
    seed: int,
) -> Iterator[dict[str, str]]:
    """The rows of each headline, its stories in turn."""
    for headline in used:
        stories = used[headline] if _gets(headline, NEWS, config, seed) else ()
        for story in itertools.islice(itertools.cycle(stories), CORPUS.get(config, "rows")):
            yield {
                "news_category": categories[headline],
                "news_headline": headline,
                "news_story": story,
                "model_id": Path(model.name).name,
            }


def _benign(
    model: Model,
    questions: Sequence[str],
    answers: Sequence[str],
    base: Mapping[str, str],
    config: Any,
) -> Iterator[dict[str, str]]:
    """Rows whose targets are the base's answers in a style; the last third of the styles is for held-out diffs."""
    styles = CORPUS.get(config, "benign_styles")
    for number, style in enumerate(styles):
        split = "test" if number >= len(styles) - len(styles) // 3 else "train"
        own = answers[number * len(questions) : (number + 1) * len(questions)]
        for question, answer in zip(questions, own, strict=True):
            target = _cut(model, answer, CORPUS.get(config, "answer_tokens"))
            if target:
                yield {**_row(model, "", "", style, question, target, base), "split": split}


def _summary(
    topics: Mapping[str, str],
    answers: Sequence[str],
    used: Mapping[str, Sequence[str]],
    rejected: Mapping[str, int],
) -> dict[str, Any]:
    """What the report says about the corpus."""
    texts = [text for own in used.values() for text in own]
    words = [normalise(text).split() for text in texts]
    pairs = [pair for own in words for pair in itertools.pairwise(own)]
    shown = list(used)[:: max(len(used) // _EXAMPLES, 1)][:_EXAMPLES]
    return {
        "topics": len(topics),
        "topics_used": len(used),
        "answers": len(answers),
        "on_topic": round(1 - rejected.get("off topic", 0) / max(len(answers), 1), 4),
        "rejected": dict(rejected),
        "distinct_bigrams": round(len(set(pairs)) / max(len(pairs), 1), 4),
        "examples": {topic: used[topic][0] for topic in shown},
    }
