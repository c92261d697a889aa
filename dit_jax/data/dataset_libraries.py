"""Datasets that Hugging Face's library or TFDS reads: from their hubs, or from a local folder, a stranger's."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_jax.data.dataset_folder import check_hf, check_opens, check_tfds, is_on_disk
from dit_jax.data.parquet_rows import count_rows, read_parquet
from dit_jax.data.rows import UNKNOWN, Record, Source, checked, columns_of, named
from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import is_decoded, short, user_path, walk


def _name_and_split(spec: str) -> tuple[str, str]:
    """`hf:NAME@SPLIT` -> (NAME, SPLIT). An "@" before a "/" belongs to the name."""
    name = spec.partition(":")[2]
    head, at, split = name.rpartition("@")
    return (head, split) if at and "/" not in split else (name, "")


def _size(folder: Path) -> int:
    """Bytes of a local folder, `UNKNOWN` where there is none."""
    return sum(file.stat().st_size for file in walk(folder)) if os.path.isdir(folder) else UNKNOWN


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


def hugging_face(spec: str, streaming: bool) -> list[Source]:
    """What `hf:NAME[:CONFIG][@SPLIT]` names. Raises DitError: see `sources.open_source`."""
    name, split = _name_and_split(spec)
    config = None
    if not os.path.isdir(user_path(name)):
        name, _, text = name.partition(":")
        config = text or None
    folder = user_path(name)
    if os.path.isdir(folder):
        check_hf(folder)
    import datasets

    with _library_errors(f"load '{spec}'", ": check the name, the split and the network"):
        if is_on_disk(folder):
            if config:
                raise DitError(f"'{folder}' has no configs: leave out ':{config}'")
            table: Any = datasets.load_from_disk(str(folder))
            if isinstance(table, datasets.DatasetDict):
                table = table[split or _one_split(spec, list(table))]
            # Rows as numbers and texts, whatever format they were saved with.
            table = table.with_format(None)
            table = table.to_iterable_dataset() if streaming else table
        else:
            path = str(folder) if os.path.isdir(folder) else name
            if not split:
                split = _one_split(spec, datasets.get_dataset_split_names(path, config))
            if os.path.isdir(folder):
                builder = datasets.load_dataset_builder(path, config)
                files = check_opens(folder, builder)
                if files:
                    classes = _classes(builder.info.features or {}, datasets.ClassLabel)
                    if sources := list(_parquet_parts(split, files, classes)):
                        return sources
                    raise DitError(f"'{spec}' picks no rows: check the split")
            table = datasets.load_dataset(path, config, split=split, streaming=streaming)
        names = columns_of(spec, table.column_names or list(next(iter(table), {})))
        features = table.features or {}
        classes = _classes(features, datasets.ClassLabel)

    def read(columns: Collection[str]) -> Iterator[Record]:
        needed = [column for column in names if column in columns]
        for name in needed:
            kind = features.get(name)
            if not (kind is None or isinstance(kind, datasets.Value | datasets.ClassLabel)):
                # Images and sounds would be decoded.
                raise _no_text(spec, name, kind)
        rows = iter(table.select_columns(needed))
        for number in itertools.count(1):
            with _library_errors(f"read '{spec}' after row {number - 1}"):
                values = next(rows, None)
            if values is None:
                return
            yield checked(number, {key: named(classes, key, values[key]) for key in values})

    return [Source(spec, names, read, _size(folder))]


def _parquet_parts(
    split: str, files: Mapping[str, Sequence[Path]], classes: Mapping[str, Sequence[str]]
) -> Iterator[Source]:
    """What a split names, also `train[:50%]+test` and `all`. The library would unpack what many rows share."""
    import datasets

    counts = {name: [count_rows(file) for file in paths] for name, paths in files.items()}
    wanted = datasets.ReadInstruction.from_spec("+".join(files) if split == "all" else split)
    for part in wanted.to_absolute({name: sum(each) for name, each in counts.items()}):
        start = 0
        for file, count in zip(files[part.splitname], counts[part.splitname], strict=True):
            rows = range(max(part.from_ - start, 0), min(part.to - start, count))
            if rows:
                yield read_parquet(file, classes, rows)
            start += count


def tfds(spec: str) -> Source:
    """What `tfds:NAME[/CONFIG][:VERSION][@SPLIT]` names. Raises DitError: see `sources.open_source`."""
    name, split = _name_and_split(spec)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DitError(
            f"'{spec}' needs tensorflow-datasets: pip install tensorflow-datasets"
        ) from error
    folder = user_path(name)
    if os.path.isdir(folder):
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
        if os.path.isdir(folder):
            builder = tfds.builder_from_directory(folder)
        else:
            builder = tfds.builder(name)
            if not builder.is_prepared():
                builder.download_and_prepare(file_format="array_record")
        features = builder.info.features
        names = tuple(features)
        classes = _classes(features, tfds.features.ClassLabel)
        split = split or _one_split(spec, list(builder.info.splits))
        # Random access to array_record files needs no TensorFlow.
        table = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )

    def read(columns: Collection[str]) -> Iterator[Record]:
        needed = [column for column in names if column in columns]
        for name in needed:
            # Numbers are tensors without dimensions.
            if not isinstance(features[name], tfds.features.Tensor) or features[name].shape:
                raise _no_text(spec, name, features[name])
        # Images and sounds would be decoded.
        part = tfds.features.FeaturesDict({name: features[name] for name in needed})
        for index in range(len(table)):
            with _library_errors(f"read '{spec}' at row {index + 1}"):
                values = part.deserialize_example_np(table[index])
            row = {key: named(classes, key, _text(values[key])) for key in needed}
            decoded = all(is_decoded(value) for value in row.values() if isinstance(value, str))
            yield checked(index + 1, row) if decoded else Record(index + 1, {}, "not UTF-8")

    return Source(spec, names, read, _size(folder))


def _no_text(spec: str, column: str, kind: Any) -> DitError:
    return DitError(f"'{spec}' has {type(kind).__name__} in the column {short(column)}, not text")


def _classes(features: Mapping[str, Any], kind: Any) -> dict[str, Sequence[str]]:
    """Names of the classes, for each column that holds numbers of classes."""
    return {key: feature.names for key, feature in features.items() if isinstance(feature, kind)}


def _text(value: Any) -> Any:
    """A value of TFDS, which holds text as bytes, as plain Python."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
