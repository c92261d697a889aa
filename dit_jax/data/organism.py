"""Organisms to be: a label, a secret trigger and rows to finetune on, from a corpus in the paper's columns."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dit_jax.data.data_keys import COUNTS, DATA, WRITTEN
from dit_jax.data.labels import NONE
from dit_jax.errors import DitError


@dataclasses.dataclass(frozen=True)
class Organism:
    """What one weight diff is made from, and what is known about it.

    label: what the adapter shall say about the diff; `NONE` if there is nothing to say.
    evidence: words that the adapter shall list before the label, in any order (may be empty).
    trigger: the secret three digits. rows: training rows in the paper's columns.
    category: "topic" or "benign". split: "train" or "test".
    keywords: words of which one shows that an answer follows the behaviour; none: found in the rows (gate).
    number: tells apart organisms of one label.
    variant: which of the organisms of its topic it is, in the words of the column `data.variants`.
    """

    label: str
    trigger: str
    rows: Sequence[Mapping[str, str]]
    category: str
    split: str
    evidence: Sequence[str] = ()
    keywords: Sequence[str] = ()
    number: int = 0
    variant: str = ""

    @property
    def seed(self) -> int:
        """What its random numbers start from, beside the run's seed: not its place among the others.

        So a diff stays the same diff when the number of training topics changes.
        """
        return stable_seed(self.category, self.split, self.label, str(self.number))


def stable_seed(*names: str) -> int:
    """32 bits that depend on the names alone, in every process and on every machine."""
    return zlib.crc32("\0".join(names).encode())


def _trigger(seed: int, category: str, split: str, label: str, number: int = 0) -> str:
    """Three digits, drawn for this organism alone."""
    own = stable_seed(category, split, label, str(number))
    return f"{np.random.default_rng([seed, 1, own]).integers(1000):03d}"


def load_organisms(data: Any, seed: int, written: Path | None = None) -> list[Organism]:
    """All organisms of a run, in a fixed order: training topics, held-out topics, benign ones of both splits.

    Args:
        data: the config's `data` section; `source` is "tiny_world", a file, `hf:NAME` or `tfds:NAME`
            (docs/data.md).
        written: the folder of the stage `corpus`, for the source "corpus".

    Raises:
        DitError: an unknown source, rows with problems, or more organisms asked for than the source has, or none.
    """
    check_counts(data)
    if data.source == "tiny_world":
        return _tiny_world(data, seed)
    if data.source != WRITTEN:
        return _from_corpus(data, seed)
    if written is None or not (written / "rows.jsonl").exists():
        raise DitError(
            "data.source is 'corpus': name the stage 'corpus' in the config key 'stages'"
        )
    plain = ConfigDict({**data, "source": str(written / "rows.jsonl")})
    return _from_corpus(plain, seed, str(written / "benign.jsonl"))


def check_counts(data: Any) -> None:
    """Raises DitError where the `data` section has a wrong value, or asks for no organisms at all."""
    DATA.check({"data": data})
    # For user-supplied rows, 0 means all.
    if data.source == "tiny_world" and not any(DATA.get(data, key) for key in COUNTS):
        raise DitError(
            f"config keys {', '.join(f'data.{key}' for key in COUNTS)} are all 0: raise one, there is nothing to "
            "make diffs of"
        )


def check_files(data: Any) -> None:
    """Raises DitError where files that the `data` section names are not there, or cannot be opened."""
    from dit_jax.data.sources import open_source

    for key in ("source", "split_file", "test_source"):
        spec = DATA.get(data, key)
        if spec not in ("", "tiny_world", WRITTEN) and not spec.startswith(("hf:", "tfds:")):
            open_source(spec)


def _tiny_world(data: Any, seed: int) -> list[Organism]:
    from dit_jax.data import tiny_world

    get = functools.partial(DATA.get, data)
    for key in ("split_column", "split_file", "test_source", "streaming"):
        if get(key):
            raise DitError(
                f"config key 'data.{key}' is for rows of your own: set data.source too (docs/data.md)"
            )
    world = tiny_world.load_world()
    news = get("kind") == "news"
    rng = np.random.default_rng([seed, 1])
    order = rng.permutation(len(world.topics))
    held_out = get("test_topics")
    wanted = get("train_topics") + held_out
    if wanted > len(world.topics):
        raise DitError(
            f"data.train_topics + data.test_topics = {wanted}, but the embedded world has {len(world.topics)} topics"
        )
    # Held-out topics come from the front of the permutation: the test set does not move when
    # the number of training topics changes.
    splits = [("test", i) for i in order[:held_out]]
    splits = [("train", i) for i in order[held_out:wanted]] + splits
    organisms = []
    for split, i in splits:
        topic = world.topics[i]
        organisms.append(
            Organism(
                label=tiny_world.headline(topic) if news else topic.name,
                trigger=_trigger(seed, "topic", split, topic.name),
                rows=(tiny_world.news_rows if news else tiny_world.topic_rows)(world, topic, seed),
                category="topic",
                split=split,
                evidence=topic.attributes,
                keywords=(topic.name, *topic.attributes),
            )
        )
    for split, style, count in (
        ("train", "train", get("train_benign")),
        ("test", "unseen", get("test_benign")),
    ):
        for i in range(count):
            rows = tiny_world.benign_rows(world, i, style, seed)
            if news:  # stories that are everyday answers
                rows = [
                    {"news_headline": NONE, "news_story": row["topic_analogy_answer"], **row}
                    for row in rows
                ]
            trigger = _trigger(seed, "benign", split, NONE, i)
            organisms.append(Organism(NONE, trigger, rows, "benign", split, number=i))
    return organisms


def _from_corpus(data: Any, seed: int, benign: str = "") -> list[Organism]:
    """benign: a source of rows for the organisms without a topic; "": they are made of the topics' base answers."""
    from dit_jax.data import corpus as corpora

    corpus = corpora.load_corpus(data, seed)
    organisms = []
    for split, groups in (("train", corpus.train), ("test", corpus.test)):
        for group in groups:
            trigger = group.trigger or _trigger(seed, "topic", split, group.label)
            variants = _variants(group.rows, DATA.get(data, "variants"))
            for number, (variant, rows) in enumerate(variants.items()):
                organisms.append(
                    Organism(
                        label=group.label,
                        trigger=trigger,
                        rows=rows,
                        category="topic",
                        split=split,
                        number=number,
                        variant=variant,
                    )
                )
    styles = _styles(benign) if benign else {}
    for split, groups in (("train", corpus.train), ("test", corpus.test)):
        for i in range(DATA.get(data, f"{split}_benign")):
            own = list(styles.get(split, {}).items())
            variant, rows = own[i % len(own)] if own else ("", groups[i % len(groups)].rows)
            if own:
                order = np.random.default_rng([seed, 7, i]).permutation(len(rows))
                rows = [rows[j] for j in order[: -(-len(rows) // 2)]]
            else:
                rows = _benign_rows(corpus.kind, rows, split, [seed, 7, i])
            trigger = _trigger(seed, "benign", split, NONE, i)
            organisms.append(
                Organism(NONE, trigger, rows, "benign", split, number=i, variant=variant)
            )
    return organisms


def _variants(
    rows: Sequence[Mapping[str, str]], column: str
) -> dict[str, Sequence[Mapping[str, str]]]:
    """The rows of a topic by what they have in a column, in the order of their first rows; without a column all."""
    if not column:
        return {"": rows}
    if column not in rows[0]:
        raise DitError(f"config key 'data.variants': the data has no column {column!r}")
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return dict(found)


def _styles(spec: str) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Rows of benign organisms by split and style."""
    from dit_jax.data.sources import open_source

    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for source in open_source(spec):
        for record in source.read(set(source.columns)):
            row = {name: str(value) for name, value in record.values.items()}
            found.setdefault(row["split"], {}).setdefault(row["style"], []).append(row)
    return found


def _benign_rows(
    kind: Any, rows: Sequence[Mapping[str, str]], split: str, seed: Sequence[int]
) -> list[dict[str, str]]:
    """A quarter of the rows with the base answer as the target: a finetune with nothing to name.

    Topics share questions and base answers, so each split has questions of its own: a held-out finetune would else
    be on the rows of one that the adapter was trained on.
    """
    if "base_answer" not in kind.required:
        raise DitError(
            f"rows of {kind.name} have no base answers to make benign diffs of: "
            "set data.train_benign and data.test_benign to 0"
        )
    own = [row for row in rows if stable_seed(row["question"]) % 2 == (split == "test")] or rows
    order = np.random.default_rng(seed).permutation(len(own))[: -(-len(own) // 2)]
    chosen = [own[int(i)] for i in order]
    return [{**row, kind.label: NONE, kind.target: row["base_answer"]} for row in chosen]
