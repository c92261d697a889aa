"""Rows of text behind one interface: CSV, JSON lines, Parquet, Hugging Face datasets and TFDS.

A source is named by one string (docs/data.md):

    topics.csv  rows.jsonl  shards/*.parquet  a/folder      files; several are read one after the other
    hf:NAME[:CONFIG][@SPLIT]                                Hugging Face datasets: a hub name or a local folder
    tfds:NAME[/CONFIG][:VERSION][@SPLIT]                    TFDS: a name, or the folder of a prepared dataset

A format's library is imported when a source of that format is opened. Nothing here runs code from the data.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import glob
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.data.dataset_folder import check_hf, check_tfds, is_on_disk
from dit_jax.errors import DitError, did_you_mean, first_line
from dit_jax.formats import budgets
from dit_jax.formats.files import short, user_path, walk
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.recognise import HEAD_BYTES, what_separator, what_table

_ROWS = 16  # of Parquet, held at once: each may be as long as MAX_FIELD
MAX_COLUMNS = 1_000
UNKNOWN = 2**62  # bytes: more than any corpus
MAX_FIELD = 2**24  # characters of one CSV field: a stray quote must not swallow a file of gigabytes


@dataclasses.dataclass(frozen=True)
class Record:
    """A row: its number (the line in a text file, else counted from 1), its values, or what is wrong with it."""

    number: int
    values: Mapping[str, Any]
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """A table that can be read any number of times.

    name: for messages. columns: their names. read: yields rows that hold at least the given columns. size: bytes on the
    disk, `UNKNOWN` of what the hub has.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Collection[str]], Iterator[Record]]
    size: int = UNKNOWN


def open_source(spec: str, *, streaming: bool = False) -> list[Source]:
    """Opens what `spec` names, one `Source` per file.

    Args:
        streaming: read a Hugging Face dataset as it downloads, without a copy on disk.

    Raises:
        DitError: there is no such file or dataset, its format is unknown, it has several splits and the spec names
            none, or it cannot be read.
    """
    if spec.startswith("hf:"):
        return [_hugging_face(spec, streaming)]
    if streaming:
        raise DitError(f"data.streaming is for hf: sources, not for '{spec}': set it to False")
    if spec.startswith("tfds:"):
        return [_tfds(spec)]
    return [_READERS[path.suffix.lower()](path) for path in _files(spec)]


# ------------------------------------------------------------------ files


def _files(spec: str) -> list[Path]:
    path = user_path(spec)
    known = ", ".join(sorted(_READERS))
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in _READERS and p.is_file())
        if not found:
            raise DitError(f"folder '{spec}' holds no file of a known format ({known})")
        kinds = sorted({p.suffix.lower() for p in found})
        if len(kinds) > 1:
            raise DitError(
                f"folder '{spec}' holds {' and '.join(kinds)}: name one, '{spec}/*{kinds[0]}'"
            )
        return found
    if path.is_file():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())
    if not found:
        near = path.parent.iterdir() if path.parent.is_dir() else ()
        hint = did_you_mean(path.name, [other.name for other in near])
        raise DitError(
            f"data source '{spec}' is not a file, folder or pattern{hint or ': hub datasets are named hf:NAME'}"
        )
    for item in found:
        if item.suffix.lower() not in _READERS:
            raise DitError(f"'{item}' has no known format ({known}): convert it or rename it")
    return found


def _csv(path: Path) -> Source:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    def lines() -> Iterator[tuple[int, list[str], str]]:
        """The line on which each record begins, its fields, and what is wrong with it; empty lines are left out."""
        csv.field_size_limit(MAX_FIELD)
        # Undecodable bytes become lone surrogates, so that messages can name their row.
        with _open(path) as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            start = 1
            try:
                for fields in reader:
                    if fields:
                        yield start, fields, ""
                    start = reader.line_num + 1
            except csv.Error as error:
                yield start, [], f"not a CSV row ({first_line(error)}), so reading stops here"

    _, header, problem = next(lines(), (1, [], "the file is empty"))
    if problem:
        raise DitError(f"'{path}' line 1: {problem}: write a header line first")
    if what := what_separator(header):
        raise DitError(f"'{path}' {what}")
    names = _columns(path, header)

    def read(columns: Collection[str]) -> Iterator[Record]:
        for number, fields, problem in itertools.islice(lines(), 1, None):
            if not problem and len(fields) != len(header):
                problem = f"{len(fields)} fields, the header has {len(header)}"
            if not problem and not all(_decoded(field) for field in fields):
                problem = "not UTF-8"
            values = {} if problem else dict(zip(header, fields, strict=True))
            yield Record(number, values, problem)

    return Source(str(path), names, read, path.stat().st_size)


def _json_lines(path: Path) -> Source:
    def read(columns: Collection[str]) -> Iterator[Record]:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if not _decoded(line):
                    yield Record(number, {}, "not UTF-8")
                    continue
                try:
                    values = parse_json(line, finite=False)  # NaN is a missing cell
                except BadJson as error:
                    yield Record(number, {}, str(error))
                    continue
                if isinstance(values, dict):
                    texts = [value for value in values.values() if isinstance(value, str)]
                    good = all(map(_decoded, texts))  # a JSON escape may be half a character
                    yield Record(number, values, "" if good else "holds half a character (\\uD800)")
                else:
                    yield Record(number, {}, "not a JSON object: write one object per line")

    # Writers may leave out empty keys, so the first hundred rows say which there are.
    columns: dict[str, None] = {}
    for record in itertools.islice(read(()), 100):
        columns |= dict.fromkeys(record.values)
    if not columns:
        raise DitError(f"'{path}' holds no JSON object: write one object per line")
    return Source(str(path), _columns(path, columns), read, path.stat().st_size)


def _columns(path: Path | str, names: Collection[str]) -> tuple[str, ...]:
    """The names of a table's columns. Raises DitError: two are the same, or there are too many."""
    if len(names) > MAX_COLUMNS:
        raise DitError(
            f"'{path}' has {len(names)} columns, more than {MAX_COLUMNS}: check the file"
        )
    name, count = Counter(list(names)).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise DitError(f"'{path}' has two columns {short(name)}: rename one")
    return tuple(names)


def _open(path: Path) -> Any:
    """A text file, whose undecodable bytes become lone surrogates. Raises DitError: no text, or not UTF-8 at all."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if head and (what := what_table(head)):
            raise DitError(f"'{path}' {what}")
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DitError(f"cannot read '{path}': {error.strerror}") from error


def _decoded(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def _parquet(path: Path) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, facts = file.schema_arrow, file.metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise DitError(f"cannot read '{path}' as Parquet: {first_line(error)}") from error
    names = _columns(path, schema.names)

    def read(columns: Collection[str]) -> Iterator[Record]:
        needed = [name for name in names if name in columns]
        for name in needed:
            if not _is_plain(kind := schema.field(name).type):
                raise DitError(f"'{path}' has {kind} in the column {short(name)}, not text")
        _check_size(path, facts)
        number = 0
        try:
            # A text that many rows share stays one.
            with pyarrow.parquet.ParquetFile(path, read_dictionary=needed) as file:
                for batch in file.iter_batches(_ROWS, columns=needed):
                    lists = [_values(column) for column in batch.columns]
                    for values in zip(*lists, strict=True):
                        number += 1
                        yield _checked(number, dict(zip(batch.schema.names, values, strict=True)))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
            raise DitError(
                f"cannot read '{path}' after row {number}: {first_line(error)}"
            ) from error

    return Source(str(path), names, read, path.stat().st_size)


def _is_plain(kind: Any) -> bool:
    """Whether a column's values can be texts: others may not even become Python's."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = (types.is_string, types.is_large_string, types.is_string_view)
    others = (types.is_integer, types.is_floating, types.is_null)
    return any(holds(kind) for holds in (*texts, *others))


def _check_size(path: Path, facts: Any) -> None:
    """Raises DitError: a Parquet file unpacks to far more than its size."""
    # Not by column: pyarrow ends the process where the facts of one are damaged.
    size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    if size > (limit := budgets.table_bytes(path.stat().st_size)):
        raise DitError(
            f"'{path}' unpacks to {size / 1e6:.0f} MB, more than the {limit / 1e6:.0f} MB that a table of its size "
            "may: write it as JSON lines"
        )


def _values(column: Any) -> list[Any]:
    """The values of a column of a batch, each text of a dictionary once."""
    from pyarrow import DictionaryArray

    if not isinstance(column, DictionaryArray):
        return list(column.to_pylist())
    indices, texts = column.indices.to_pylist(), column.dictionary
    known = {i for i in indices if i is not None}
    if known and not 0 <= min(known) <= max(known) < len(texts):  # pyarrow does not look
        raise IndexError("a row points beyond the texts of its column")
    found = {i: None if i is None else texts[i].as_py() for i in set(indices)}
    return [found[i] for i in indices]


def _checked(number: int, values: Mapping[str, Any]) -> Record:
    """A row whose texts are not too long."""
    long = next((k for k, x in values.items() if isinstance(x, str) and len(x) > MAX_FIELD), None)
    if long is None:
        return Record(number, values)
    return Record(number, {}, f"{short(long)} has more than {MAX_FIELD} characters")


_READERS: dict[str, Callable[[Path], Source]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}


# ------------------------------------------------------------------ libraries


def _name_and_split(spec: str) -> tuple[str, str]:
    """`hf:NAME@SPLIT` -> (NAME, SPLIT). An "@" before a "/" belongs to the name."""
    name = spec.partition(":")[2]
    head, at, split = name.rpartition("@")
    return (head, split) if at and "/" not in split else (name, "")


def _size(folder: Path) -> int:
    """Bytes of a local folder, `UNKNOWN` where there is none."""
    return sum(file.stat().st_size for file in walk(folder)) if folder.is_dir() else UNKNOWN


def _one_split(spec: str, splits: Collection[str]) -> str:
    if len(splits) == 1:
        return next(iter(splits))
    raise DitError(
        f"'{spec}' has the splits {', '.join(splits)}: name one, '{spec}@{next(iter(splits), 'train')}' "
        "(and the other one in data.test_source)"
    )


@contextlib.contextmanager
def _library_errors(action: str, remedy: str = "") -> Iterator[None]:
    """Turns an error of a library, which may be of a dozen kinds, into a DitError: `cannot <action>: <error>`."""
    try:
        yield
    except DitError:
        raise
    except Exception as error:
        raise DitError(f"cannot {action}: {first_line(error)}{remedy}") from error


def _hugging_face(spec: str, streaming: bool) -> Source:
    name, split = _name_and_split(spec)
    folder = user_path(name)
    config = None
    if not folder.is_dir():
        name, _, text = name.partition(":")
        config = text or None
    else:
        check_hf(folder)
    import datasets

    with _library_errors(f"load '{spec}'", ": check the name, the split and the network"):
        if is_on_disk(folder):
            table: Any = datasets.load_from_disk(str(folder))
            if isinstance(table, datasets.DatasetDict):
                table = table[split or _one_split(spec, list(table))]
            table = table.to_iterable_dataset() if streaming else table
        else:
            path = str(folder) if folder.is_dir() else name
            if not split:
                split = _one_split(spec, datasets.get_dataset_split_names(path, config))
            table = datasets.load_dataset(path, config, split=split, streaming=streaming)
        names = _columns(spec, table.column_names or list(next(iter(table), {})))
        features = table.features or {}
        classes = _classes(features, datasets.ClassLabel)

    def read(columns: Collection[str]) -> Iterator[Record]:
        needed = [column for column in names if column in columns]
        for name in needed:
            kind = features.get(name)
            if not (kind is None or isinstance(kind, datasets.Value | datasets.ClassLabel)):
                # Images and sounds would be decoded.
                raise DitError(
                    f"'{spec}' has {type(kind).__name__} in the column {short(name)}, not text"
                )
        rows = iter(table.select_columns(needed))
        for number in itertools.count(1):
            with _library_errors(f"read '{spec}' after row {number - 1}"):
                values = next(rows, None)
            if values is None:
                return
            yield _checked(number, {key: _named(classes, key, values[key]) for key in values})

    return Source(spec, names, read, _size(folder))


def _tfds(spec: str) -> Source:
    name, split = _name_and_split(spec)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DitError(
            f"'{spec}' needs tensorflow-datasets: pip install tensorflow-datasets"
        ) from error
    folder = user_path(name)
    if folder.is_dir():
        check_tfds(folder)
    # NAMESPACE:NAME; a version has a digit after the colon.
    elif re.match(r"\w+:\D", name):
        raise DitError(
            f"'{spec}' is a community dataset, whose code TFDS would download and run: prepare it yourself and "
            "name its folder"
        )
    remedy = (
        "check the name and the split; the data must be prepared with file_format='array_record'"
    )
    with _library_errors(f"load '{spec}'", f": {remedy}"):
        if folder.is_dir():
            builder = tfds.builder_from_directory(folder)
        else:
            builder = tfds.builder(name)
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
        names = tuple(builder.info.features)
        classes = _classes(builder.info.features, tfds.features.ClassLabel)
        split = split or _one_split(spec, list(builder.info.splits))
        # Random access to array_record files needs no TensorFlow.
        table = builder.as_data_source(split)

    def read(columns: Collection[str]) -> Iterator[Record]:
        for index in range(len(table)):
            with _library_errors(f"read '{spec}' at row {index + 1}"):
                values = table[index]
            row = {key: _named(classes, key, _text(values[key])) for key in names if key in columns}
            decoded = all(_decoded(value) for value in row.values() if isinstance(value, str))
            yield _checked(index + 1, row) if decoded else Record(index + 1, {}, "not UTF-8")

    return Source(spec, names, read, _size(folder))


def _classes(features: Mapping[str, Any], kind: Any) -> dict[str, Sequence[str]]:
    """Names of the classes, for each column that holds numbers of classes."""
    return {key: feature.names for key, feature in features.items() if isinstance(feature, kind)}


def _named(classes: Mapping[str, Sequence[str]], column: str, value: Any) -> Any:
    """A value, with the name of a class in place of its number; None for a row without a class (-1)."""
    names = classes.get(column)
    if names is None or value is None:
        return value
    return names[value] if 0 <= value < len(names) else None


def _text(value: Any) -> Any:
    """A value of TFDS, which holds text as bytes, as plain Python."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
