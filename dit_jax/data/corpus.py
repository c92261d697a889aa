"""A corpus in the paper's columns: read from any source, checked row by row, split into train and test.

One message names all problems of the data, by file and row, before anything is trained.
"""

from __future__ import annotations

import array
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dit_jax.data.data_keys import DATA
from dit_jax.data.kinds import Kind, get_kind
from dit_jax.data.labels import called_none, normalise
from dit_jax.data.sources import Source, open_source
from dit_jax.errors import DitError, did_you_mean
from dit_jax.formats import budgets
from dit_jax.runtime.outgoing import from_cell

SHOWN_PROBLEMS = 5
OVERLAP_WORDS = 6  # answers with fewer words may agree by chance
SPLITS = ("train", "test")
UNUSED_SPLITS = ("extra", "validation", "val", "dev")


def data_config(source: str, kind: str = "topics") -> ConfigDict:
    """The `data` section of a config, with every key (docs/data.md). Raises DitError: the kind is unknown."""
    columns = get_kind(kind).columns
    given = {"source": source, "kind": kind, "columns": dict(zip(columns, columns, strict=True))}
    return ConfigDict({key.name: given.get(key.name, key.default) for key in DATA.keys})


class Problems:
    """The first problems of the data, by row, and how many there are."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(f"{where}: {what if len(what) < 140 else what[:139] + '…'}")

    def check(self) -> None:
        """Raises DitError if there was a problem."""
        if self.count:
            more = self.count - len(self.first)
            rest = f"; and {more} more" if more else ""
            noun = "problem" if self.count == 1 else "problems"
            raise DitError(f"the data has {self.count} {noun}: {'; '.join(self.first)}{rest}")


class TextRows(Sequence[Mapping[str, str]]):
    """Rows of one topic, held as tuples: a corpus has a million rows, and dicts take four times the memory."""

    def __init__(self, columns: tuple[str, ...], names: Sequence[str]):
        self.columns = columns
        self.values: list[tuple[str, ...]] = []
        self._names = names
        self._source, self._number = array.array("l"), array.array("q")

    def append(self, values: tuple[str, ...], source: int, number: int) -> None:
        self.values.append(values)
        self._source.append(source)
        self._number.append(number)

    def where(self, index: int) -> str:
        return f"{self._names[self._source[index]]}:{self._number[index]}"

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return dict(zip(self.columns, self.values[index], strict=True))


@dataclasses.dataclass
class Group:
    """All rows of one label. split: "train", "test", "" (unused) or None (the data does not say)."""

    label: str
    rows: TextRows
    split: str | None = None
    trigger: str | None = None


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Checked and split groups, each in the order of the data."""

    kind: Kind
    train: list[Group]
    test: list[Group]


def load_corpus(data: Any, seed: int) -> Corpus:
    """Reads, checks and splits the corpus of a config's `data` section.

    Raises:
        DitError: a source cannot be read, lacks a column or has fewer topics than the section asks for; or its rows
            have problems, of which the message names the first few by file and row and counts the rest.
    """
    get = functools.partial(DATA.get, data)
    ways = [key for key in ("split_column", "split_file", "test_source") if get(key)]
    if len(ways) > 1:
        raise DitError(
            f"data.{ways[0]} and data.{ways[1]} both say what is held out: set only one of them"
        )
    reader = _Reader(get_kind(get("kind")), dict(get("columns")))
    kind, problems, groups = reader.kind, reader.problems, reader.groups
    for source in open_source(data.source, streaming=get("streaming")):
        reader.read(source, get("split_column"), "train" if get("test_source") else None)
    if get("test_source"):
        for source in open_source(data.test_source, streaming=get("streaming")):
            reader.read(source, "", "test")
    if get("split_file"):
        reader.read_splits(data.split_file)
    if not groups and not problems.count:
        raise DitError(f"data source '{data.source}' holds no rows")
    if not ways:
        problems.check()
        train, test = _random_split(list(groups.values()), data, seed)
    else:
        train, test = (
            [group for group in groups.values() if group.split == split] for split in SPLITS
        )
        _check_labels(train, test, problems)
    _check_answers(kind, train, test, problems)
    problems.check()
    if ways:
        rng = np.random.default_rng([seed, 5])
        test = _choose(test, "test", data, rng)
        train = _choose(train, "train", data, rng)
    return Corpus(kind, train, test)


# ------------------------------------------------------------------ reading


@dataclasses.dataclass
class _Reader:
    """Collects the rows of several sources by label, and what is wrong with them.

    columns: our column -> the source's, where they differ. names: of the sources read so far.
    """

    kind: Kind
    columns: Mapping[str, str]
    groups: dict[str, Group] = dataclasses.field(default_factory=dict)
    names: list[str] = dataclasses.field(default_factory=list)
    size: int = 0  # bytes of the sources that were read
    held: int = 0  # bytes that rows and topics take beside their texts
    problems: Problems = dataclasses.field(default_factory=Problems)

    def _column_map(self, source: Source, split_column: str) -> dict[str, str]:
        """Our column -> the source's. Raises DitError: the source lacks one."""
        kind, given = self.kind, self.columns
        for name in given:
            if name not in kind.columns:
                hint = did_you_mean(name, kind.columns) or f": they have {', '.join(kind.columns)}"
                raise DitError(
                    f"config key 'data.columns.{name}' is not a column of {kind.name}{hint}"
                )
        mapped = {name: given.get(name) or name for name in kind.columns}
        needed = [(f"data.columns.{name}", mapped[name]) for name in kind.required]
        # An optional column may be absent, unless the config names it.
        needed += [(f"data.columns.{n}", mapped[n]) for n in kind.optional if mapped[n] != n]
        needed += [("data.split_column", split_column)] if split_column else []
        missing = [
            f"'{column}'{did_you_mean(column, source.columns)} ({key})"
            for key, column in needed
            if column not in source.columns
        ]
        if missing:
            raise DitError(
                f"'{source.name}' has no column {' and no column '.join(missing)}; its columns are "
                f"{', '.join(source.columns)}: correct the keys in brackets"
            )
        return {name: column for name, column in mapped.items() if column in source.columns}

    def _hold(self, source: Source, count: int) -> None:
        """Raises DitError: small files ask for more memory than theirs."""
        self.held += count
        if self.held > budgets.held_bytes(self.size):
            raise DitError(
                f"'{source.name}' has more rows or topics than {self.size / 1e6:.1f} MB of files may: write fewer"
            )

    def read(self, source: Source, split_column: str, given: str | None) -> None:
        """Adds the rows of a source to the groups of their labels. given: their split, if it is known."""
        problems, mapped = self.problems, self._column_map(source, split_column)
        self.names.append(source.name)
        self.size += source.size
        columns = tuple(mapped)
        # JSON lines may bring an optional column after the rows that told which there are.
        late = [name for name in self.kind.optional if name not in mapped]
        # Questions and base answers repeat with every topic: hold each once.
        shared: dict[str, str] = {}
        for record in source.read({*mapped.values(), *([split_column] if split_column else [])}):
            where = f"{source.name}:{record.number}"
            self._hold(source, budgets.ROW_BYTES)
            if record.problem:
                problems.add(where, record.problem)
                continue
            before = problems.count
            for name in late:
                if record.values.get(name):
                    problems.add(where, f"'{name}' begins here: give it to the first row, too")
            values = []
            for name, column in mapped.items():
                text = _as_text(record.values.get(column))
                if text is None:
                    found = type(record.values[column]).__name__
                    problems.add(where, f"'{column}' is {found}, not text")
                elif not text.strip() and name in self.kind.required:
                    problems.add(where, f"empty '{column}'")
                values.append(shared.setdefault(text or "", text or ""))
            label = " ".join(values[columns.index(self.kind.label)].split())
            if called_none(label):
                problems.add(
                    where, f"'{label}' is what a diff without a topic is called: rename it"
                )
            elif label and not normalise(label):
                problems.add(where, f"'{label}' is no name that an answer could give: rename it")
            split = given
            if split_column:
                split = _as_text(record.values.get(split_column)) or ""
                _check_split(split, where, split_column, problems)
            if problems.count > before:
                continue
            if label not in self.groups:
                self._hold(source, budgets.GROUP_BYTES)
            group = self.groups.setdefault(
                label, Group(label, TextRows(columns, self.names), split)
            )
            if group.rows.columns != columns:
                raise DitError(
                    f"'{source.name}' has other columns than '{group.rows.where(0)}' "
                    f"({', '.join(group.rows.columns)}): give all files of a corpus the same ones"
                )
            group.rows.append(tuple(values), len(self.names) - 1, record.number)
            if group.split != split:
                first = group.rows.where(0)
                problems.add(where, f"'{label}' is in {split} here and in {group.split} at {first}")

    def read_splits(self, spec: str) -> None:
        """Takes splits, and triggers if there are any, from an index with the columns topic, split, trigger."""
        groups, problems = self.groups, self.problems
        seen: dict[str, tuple[str, str]] = {}
        for source in open_source(spec):
            self.size += source.size
            label_column = "topic" if "topic" in source.columns else self.kind.label
            for name in (label_column, "split"):
                if name not in source.columns:
                    raise DitError(
                        f"split file '{source.name}' has no column '{name}'{did_you_mean(name, source.columns)}; "
                        f"its columns are {', '.join(source.columns)}"
                    )
            for record in source.read({label_column, "split", "trigger"}):
                where = f"{source.name}:{record.number}"
                self._hold(source, budgets.ROW_BYTES)
                if record.problem:
                    problems.add(where, record.problem)
                    continue
                said = from_cell(_as_text(record.values.get(label_column)) or "")  # of a store
                label = " ".join(said.split())
                split = _as_text(record.values.get("split")) or ""
                _check_split(split, where, "split", problems)
                if label not in seen:
                    self._hold(source, budgets.GROUP_BYTES)
                earlier, at = seen.setdefault(label, (split, where))
                if earlier != split:
                    problems.add(where, f"'{label}' is in {split} here and in {earlier} at {at}")
                if label in groups:
                    groups[label].split = split
                    trigger = _as_text(record.values.get("trigger")) or ""
                    groups[label].trigger = trigger.zfill(3) if _is_code(trigger) else None
                elif split in SPLITS:
                    shown = problems.count < SHOWN_PROBLEMS  # to look among all topics takes long
                    hint = did_you_mean(label, groups) if shown else ""
                    problems.add(where, f"'{label}' is not in the data{hint}")
        for group in groups.values():
            group.split = group.split or ""


def _as_text(value: Any) -> str | None:
    """A value as text: "" for a missing one, numbers (a topic may be 1984) as written, None for anything else."""
    if value is None or (isinstance(value, float) and value != value):  # NaN is a missing cell
        return ""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_split(split: str, where: str, column: str, problems: Problems) -> None:
    allowed = (*SPLITS, *UNUSED_SPLITS)
    if split not in allowed:
        hint = did_you_mean(split.casefold(), allowed) or f": use {', '.join(allowed)}"
        problems.add(where, f"'{column}' is '{split}'{hint}")


def _is_code(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 3


# ------------------------------------------------------------------ checking and splitting


def _check_labels(train: list[Group], test: list[Group], problems: Problems) -> None:
    """Finds labels of the test set that the training set has in another spelling."""
    trained = {normalise(group.label): group for group in train}
    for group in test:
        other = trained.get(normalise(group.label))
        if other is not None and other.label != group.label:
            problems.add(
                group.rows.where(0),
                f"'{group.label}' is in test and '{other.label}' in train ({other.rows.where(0)})",
            )


def _check_answers(kind: Kind, train: list[Group], test: list[Group], problems: Problems) -> None:
    """Finds targets of test topics that a training topic has for the same question."""
    held_out = dict(_answers(kind, test))
    for key, where in _answers(kind, train):
        if key in held_out:
            problems.add(where, f"the same '{kind.target}' as {held_out[key]}, which is in test")


def _answers(kind: Kind, groups: Iterable[Group]) -> Iterator[tuple[int, str]]:
    """(hash of question and target, where) of every row whose target says something about its topic."""
    for group in groups:
        for index, row in enumerate(group.rows):
            target = row[kind.target]
            # A topic may leave an answer unchanged, and a base answer says nothing about the topic.
            if target != row.get("base_answer") and len(target.split()) >= OVERLAP_WORDS:
                yield hash((row.get("question"), target)), group.rows.where(index)


def _random_split(groups: list[Group], data: Any, seed: int) -> tuple[list[Group], list[Group]]:
    """Takes held-out topics from the front of a permutation, so that they stay when train_topics changes.

    Labels that differ only in case, punctuation or an article are one topic: all of them are training topics, or the
    first one alone is held out.
    """
    same: dict[str, list[Group]] = {}
    for group in groups:
        same.setdefault(normalise(group.label), []).append(group)
    topics = list(same.values())
    order = np.random.default_rng([seed, 1]).permutation(len(topics))
    most_train, most_test = (int(DATA.get(data, f"{split}_topics")) for split in SPLITS)
    if most_test < 1:
        raise DitError(
            "nothing says what is held out: set data.test_topics (drawn by the seed), data.split_column, "
            "data.split_file or data.test_source"
        )
    test = [topics[i][0] for i in order[:most_test]]
    train = [group for i in order[most_test:] for group in topics[i]]
    if len(test) < most_test or most_train > len(train) or not train:
        raise DitError(
            f"data.train_topics = {most_train} and data.test_topics = {most_test}, but "
            f"'{data.source}' has {len(topics)} topics"
        )
    return train[: most_train or len(train)], test


def _choose(groups: list[Group], split: str, data: Any, rng: np.random.Generator) -> list[Group]:
    """The first `data.<split>_topics` groups of a permutation; for 0, all in the order of the data."""
    wanted = data[f"{split}_topics"]
    if wanted > len(groups) or not groups:
        raise DitError(
            f"data.{split}_topics = {wanted}, but '{data.source}' has {len(groups)} topics in {split}"
        )
    return [groups[i] for i in rng.permutation(len(groups))[:wanted]] if wanted else groups
