"""Rows of Parquet files, which may unpack to far more than their size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.data.rows import Record, Source, checked, columns_of, named
from dit_jax.errors import DitError, first_line
from dit_jax.formats import budgets
from dit_jax.formats.files import short
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.json_shape import each, fits, is_text

_ROWS = 16  # held at once: each may be as long as MAX_FIELD


def count_rows(path: Path) -> int:
    """The number of rows of a Parquet file, as it says. Raises what pyarrow raises."""
    import pyarrow.parquet

    facts = pyarrow.parquet.read_metadata(path)
    return sum(facts.row_group(group).num_rows for group in range(facts.num_row_groups))


def read_parquet(
    path: Path, classes: Mapping[str, Sequence[str]] | None = None, part: range | None = None
) -> Source:
    """The rows of a Parquet file.

    Args:
        classes: names of the classes, for each column that holds their numbers, beside those that the file tells.
        part: the rows that count, from 0; default: all.

    Raises:
        DitError: it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, facts = file.schema_arrow, file.metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise DitError(f"cannot read '{path}' as Parquet: {first_line(error)}") from error
    names = columns_of(path, schema.names)
    classes = {**_classes(path, schema), **(classes or {})}

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
                        if part is not None and number - 1 not in part:
                            continue
                        row = dict(zip(batch.schema.names, values, strict=True))
                        yield checked(number, {k: named(classes, k, row[k]) for k in row})
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
            raise DitError(
                f"cannot read '{path}' after row {number}: {first_line(error)}"
            ) from error

    return Source(str(path), names, read, path.stat().st_size)


def _classes(path: Path, schema: Any) -> dict[str, list[str]]:
    """Names of the classes of each column, as Hugging Face's library writes them into a file."""
    try:
        told = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"] if told else {}
        found = {key: kind["names"] for key, kind in features.items() if "names" in kind}
    except (BadJson, LookupError, TypeError, AttributeError):
        found = None
    if found is None or not fits(found, each([is_text])):
        raise DitError(f"'{path}' tells no features that can be read: write the file again")
    return found


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
