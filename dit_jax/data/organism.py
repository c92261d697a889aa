"""Organisms before they are finetuned: a label, a secret trigger and rows in the paper's columns."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dit_jax.data import tiny_world
from dit_jax.data.corpus import SPLITS, Group, load_corpus
from dit_jax.data.data_keys import BENIGN, COUNTS, DATA, ROWS, WRITTEN
from dit_jax.data.kinds import Kind
from dit_jax.data.labels import NONE
from dit_jax.data.sources import open_source
from dit_jax.errors import DitError
from dit_jax.formats.files import user_path


@dataclasses.dataclass(frozen=True)
class Organism:
    """What one weight diff is made from, and what is known about it.

    label: what the adapter should say about the diff; `NONE` if there is nothing to say.
    trigger: three secret digits. rows: training rows in the paper's columns.
    category: "topic" or "benign". split: "train" or "test".
    evidence: words that the adapter should list before the label, in any order (may be empty).
    keywords: any of these words shows that an answer follows the behaviour; empty: the gate finds some in the rows.
    number: distinguishes organisms with the same label.
    variant: which of its topic's organisms it is, as the column `data.variants` says.
    topic_category: the category of its topic, if its rows have one.
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
    topic_category: str = ""

    @property
    def seed(self) -> int:
        """The seed of its random numbers, beside the run's. It does not depend on the other organisms, so that a diff
        stays the same when the number of training topics changes."""
        return stable_seed(self.category, self.split, self.label, str(self.number))


def stable_seed(*names: str) -> int:
    """32 bits that depend on nothing but the names, the same in every process and on every machine."""
    return zlib.crc32("\0".join(names).encode())


def _trigger(seed: int, category: str, split: str, label: str, number: int = 0) -> str:
    """Three digits, drawn for one organism."""
    own = stable_seed(category, split, label, str(number))
    return f"{np.random.default_rng([seed, 1, own]).integers(1000):03d}"


def load_organisms(data: Any, seed: int, written: Path | None = None) -> list[Organism]:
    """All organisms of a run, in a fixed order: training topics, held-out topics, then the benign ones of both splits.

    Args:
        data: the config's `data` section; `source` is "tiny_world", a file, `hf:NAME` or `tfds:NAME` (docs/data.md).
        written: the folder of the stage `corpus`, for the source "corpus".

    Raises:
        DitError: the source is unknown, its rows have problems, or it has fewer organisms than the section asks for.
    """
    check_counts(data)
    if data.source == "tiny_world":
        topics, benign_rows = _tiny_world(data, seed)
    elif data.source != WRITTEN:
        topics, benign_rows = _from_corpus(data, seed)
    elif written is None or not (written / ROWS).exists():
        raise DitError(
            "data.source is 'corpus': name the stage 'corpus' in the config key 'stages'"
        )
    else:
        plain = ConfigDict({**data, "source": str(written / ROWS)})
        styled = written / BENIGN  # empty without corpus.benign_styles
        benign_file = str(styled) if styled.exists() and styled.stat().st_size else ""
        topics, benign_rows = _from_corpus(plain, seed, benign_file)

    def benign(split: str, number: int) -> Organism:
        variant, rows = benign_rows(split, number)
        trigger = _trigger(seed, "benign", split, NONE, number)
        return Organism(NONE, trigger, rows, "benign", split, number=number, variant=variant)

    counts = {split: DATA.get(data, f"{split}_benign") for split in SPLITS}
    return topics + [benign(split, i) for split in SPLITS for i in range(counts[split])]


def check_counts(data: Any) -> None:
    """Raises DitError if the `data` section has a wrong value or asks for no organisms."""
    DATA.check({"data": data})
    # For user-supplied rows, 0 topics mean all.
    if data.source == "tiny_world" and not any(DATA.get(data, key) for key in COUNTS):
        raise DitError(
            f"config keys {', '.join(f'data.{key}' for key in COUNTS)} are all 0, so there is nothing to make diffs "
            "of: raise one"
        )


def check_files(data: Any) -> None:
    """Raises DitError if a file that the `data` section names does not exist or cannot be opened."""
    for key in ("source", "split_file", "test_source"):
        spec = DATA.get(data, key)
        if spec not in ("", "tiny_world", WRITTEN) and not spec.startswith(("hf:", "tfds:")):
            try:
                open_source(spec)
            except DitError as error:
                how = DATA.get(data, "download")
                missing = not user_path(spec).exists()
                raise DitError(f"{error}; to get it: {how}") if how and missing else error from None


Rows = Sequence[Mapping[str, str]]
# The organisms with a topic, and (split, number) -> variant and rows of a benign one.
_Found = tuple[list[Organism], Callable[[str, int], tuple[str, Rows]]]


def _tiny_world(data: Any, seed: int) -> _Found:
    get = functools.partial(DATA.get, data)
    asked = {"columns": [name for name, column in get("columns").items() if name != column]}
    for key in ("split_column", "split_file", "test_source", "variants", "streaming"):
        asked[key] = get(key)
    for key, value in asked.items():
        if value:
            raise DitError(
                f"config key 'data.{key}' is for user-supplied rows: set data.source too (docs/data.md)"
            )
    world = tiny_world.load_world()
    news = get("kind") == "news"
    order = np.random.default_rng([seed, 1]).permutation(len(world.topics))
    held_out = get("test_topics")
    wanted = get("train_topics") + held_out
    if wanted > len(world.topics):
        raise DitError(
            f"data.train_topics + data.test_topics = {wanted}, but the embedded world has {len(world.topics)} topics"
        )

    def organism(split: str, topic: tiny_world.Topic) -> Organism:
        make_rows = tiny_world.news_rows if news else tiny_world.topic_rows
        return Organism(
            label=tiny_world.headline(topic) if news else topic.name,
            trigger=_trigger(seed, "topic", split, topic.name),
            rows=make_rows(world, topic, seed),
            category="topic",
            split=split,
            evidence=topic.attributes,
            keywords=(topic.name, *topic.attributes),
            topic_category=topic.category,
        )

    def benign_rows(split: str, number: int) -> tuple[str, Rows]:
        style = "train" if split == "train" else "unseen"
        rows = tiny_world.benign_rows(world, number, style, seed)
        if news:  # stories that are everyday answers
            rows = [
                {"news_headline": NONE, "news_story": row["topic_analogy_answer"], **row}
                for row in rows
            ]
        return "", rows

    # Held-out topics come first in the permutation, so that they stay when the number of training topics changes.
    splits = (("train", order[held_out:wanted]), ("test", order[:held_out]))
    return [organism(split, world.topics[i]) for split, own in splits for i in own], benign_rows


def _from_corpus(data: Any, seed: int, benign: str = "") -> _Found:
    """benign: a source of rows for benign organisms; "": they are made from the base answers of topics."""
    corpus = load_corpus(data, seed)
    groups = {"train": corpus.train, "test": corpus.test}
    styles = _styles(benign, corpus.kind) if benign else {}

    def organisms(split: str, group: Group) -> list[Organism]:
        trigger = group.trigger or _trigger(seed, "topic", split, group.label)
        variants = _variants(group.rows, DATA.get(data, "variants"))
        area = group.rows[0].get(corpus.kind.category, "")
        return [
            Organism(
                group.label, trigger, rows, "topic", split,
                evidence=rows[0].get("evidence", "").split(),
                number=number, variant=variant, topic_category=area,
            )
            for number, (variant, rows) in enumerate(variants.items())
        ]  # fmt: skip

    def benign_rows(split: str, number: int) -> tuple[str, Rows]:
        own = list(styles.get(split, {}).items())
        if not own:
            rows: Rows = groups[split][number % len(groups[split])].rows
            return "", _benign_rows(corpus.kind, rows, split, [seed, 7, number])
        variant, rows = own[number % len(own)]
        order = np.random.default_rng([seed, 7, number]).permutation(len(rows))
        return variant, [rows[i] for i in order[: -(-len(rows) // 2)]]

    topics = [one for split in SPLITS for group in groups[split] for one in organisms(split, group)]
    return topics, benign_rows


def _variants(rows: Rows, column: str) -> dict[str, Rows]:
    """The rows of a topic by their value in a column, in the order of first rows; without a column, all as one."""
    if not column:
        return {"": rows}
    if column not in rows[0]:
        raise DitError(f"config key 'data.variants': the data has no column {column!r}")
    found: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return dict(found)


def _styles(spec: str, kind: Kind) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Rows of benign organisms by split and style. Raises DitError: one is damaged."""
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    needed = {"split", "style", *kind.required}
    for source in open_source(spec):
        for record in source.read(set(source.columns)):
            missing = sorted(needed - record.values.keys())
            if record.problem or missing:
                raise DitError(
                    f"{source.name}:{record.number}: {record.problem or f'no {missing[0]!r}'}: run the stage 'corpus' "
                    "again"
                )
            row = {name: str(value) for name, value in record.values.items()}
            found.setdefault(row["split"], {}).setdefault(row["style"], []).append(row)
    return found


def _benign_rows(kind: Kind, rows: Rows, split: str, seed: Sequence[int]) -> list[dict[str, str]]:
    """A quarter of the rows with the base answer as the target: a finetune with nothing to name.

    Topics share questions and base answers. So each split has its own questions; otherwise a held-out finetune would
    have the rows of one that the adapter was trained on.
    """
    if "base_answer" not in kind.required:
        raise DitError(
            f"rows of {kind.name} have no base answers for benign diffs: "
            "set data.train_benign and data.test_benign to 0"
        )
    own = [row for row in rows if stable_seed(row["question"]) % 2 == (split == "test")] or rows
    order = np.random.default_rng(seed).permutation(len(own))[: -(-len(own) // 2)]
    chosen = [own[int(i)] for i in order]
    return [{**row, kind.label: NONE, kind.target: row["base_answer"]} for row in chosen]
