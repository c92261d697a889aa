"""Rows of text behind one interface: CSV, JSON lines, Parquet, Hugging Face datasets and TFDS.

A source is named by one string (docs/data.md):

    topics.csv  rows.jsonl  shards/*.parquet  a/folder      files; several are read one after the other
    hf:NAME[:CONFIG][@SPLIT]                                Hugging Face datasets: a hub name or a local folder
    tfds:NAME[/CONFIG][:VERSION][@SPLIT]                    TFDS: a name, or the folder of a prepared dataset

A format's library is imported when a source of that format is opened. Nothing here runs code from the data.
"""

from __future__ import annotations

import csv
import glob
import itertools
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from dit_jax.data import rows
from dit_jax.data.dataset_folder import COMPRESSED
from dit_jax.data.dataset_libraries import hugging_face, tfds
from dit_jax.data.parquet_rows import read_parquet
from dit_jax.data.rows import Record, Source, columns_of
from dit_jax.errors import DitError, did_you_mean, first_line
from dit_jax.formats.files import is_decoded, regular_file, user_path
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.recognise import HEAD_BYTES, what_separator, what_table


def open_source(spec: str, *, streaming: bool = False) -> list[Source]:
    """Opens what `spec` names, one `Source` per file.

    Args:
        streaming: read a Hugging Face dataset as it downloads, without a copy on disk.

    Raises:
        DitError: there is no such file or dataset, its format is unknown, it has several splits and the spec names
            none, or it cannot be read.
    """
    if spec.startswith("hf:"):
        return hugging_face(spec, streaming)
    if streaming:
        raise DitError(f"data.streaming is for hf: sources, not for '{spec}': set it to False")
    if spec.startswith("tfds:"):
        return [tfds(spec)]
    return [_READERS[path.suffix.lower()](regular_file(path)) for path in _files(spec)]


# ------------------------------------------------------------------ files


def _files(spec: str) -> list[Path]:
    path = user_path(spec)
    known = ", ".join(sorted(_READERS))
    if os.path.isdir(path):
        names = sorted(path.iterdir())
        for name in names:
            if name.suffix.lower() in COMPRESSED and Path(name.stem).suffix.lower() in _READERS:
                raise DitError(f"'{name}' is compressed: unpack it first")
        found = [p for p in names if p.suffix.lower() in _READERS and not p.is_dir()]
        if not found:
            raise DitError(f"folder '{spec}' holds no file of a known format ({known})")
        kinds = sorted({p.suffix.lower() for p in found})
        if len(kinds) > 1:
            raise DitError(
                f"folder '{spec}' holds {' and '.join(kinds)}: name one, '{spec}/*{kinds[0]}'"
            )
        return found
    if os.path.isfile(path):
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(str(path)) if not os.path.isdir(name))
    if not found:
        near = path.parent.iterdir() if os.path.isdir(path.parent) else ()
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
        csv.field_size_limit(rows.MAX_FIELD)
        # Undecodable bytes become lone surrogates, so that messages can name their row.
        with _open(path) as file:
            reader = csv.reader(_lines(path, file), delimiter=delimiter, strict=True)
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
    names = columns_of(path, header)

    def read(columns: Collection[str]) -> Iterator[Record]:
        for number, fields, problem in itertools.islice(lines(), 1, None):
            if not problem and len(fields) != len(header):
                problem = f"{len(fields)} fields, the header has {len(header)}"
            if not problem and not all(is_decoded(field) for field in fields):
                problem = "not UTF-8"
            values = {} if problem else dict(zip(header, fields, strict=True))
            yield Record(number, values, problem)

    return Source(str(path), names, read, path.stat().st_size)


def _json_lines(path: Path) -> Source:
    def read(columns: Collection[str]) -> Iterator[Record]:
        with _open(path) as file:
            for number, line in enumerate(_lines(path, file), start=1):
                if not line.strip():
                    continue
                if not is_decoded(line):
                    yield Record(number, {}, "not UTF-8")
                    continue
                try:
                    values = parse_json(line, finite=False)  # NaN is a missing cell
                except BadJson as error:
                    yield Record(number, {}, str(error))
                    continue
                if isinstance(values, dict):
                    texts = [value for value in values.values() if isinstance(value, str)]
                    good = all(map(is_decoded, texts))  # a JSON escape may be half a character
                    yield Record(number, values, "" if good else "holds half a character (\\uD800)")
                else:
                    yield Record(number, {}, "not a JSON object: write one object per line")

    # Writers may leave out empty keys, so the first hundred rows say which there are.
    columns: dict[str, None] = {}
    for record in itertools.islice(read(()), 100):
        columns |= dict.fromkeys(record.values)
    if not columns:
        raise DitError(f"'{path}' holds no JSON object: write one object per line")
    return Source(str(path), columns_of(path, columns), read, path.stat().st_size)


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


def _lines(path: Path, file: Any) -> Iterator[str]:
    """Raises DitError: a line is longer than any row, whose fields would take many times its size."""
    while line := file.readline(rows.MAX_LINE + 1):
        if len(line) > rows.MAX_LINE:
            raise DitError(
                f"'{path}' has a line of more than {rows.MAX_LINE} characters: write rows in lines of their own"
            )
        yield line


_READERS: dict[str, Callable[[Path], Source]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": read_parquet,
}
