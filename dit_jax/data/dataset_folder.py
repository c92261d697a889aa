"""Local folders of datasets. Their libraries open each path and import each module that a folder names."""

import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import check_tree, file_inside, has_file, read_json_object, short, walk
from dit_jax.formats.json_parser import BadJson, parse_json

COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz")
_ON_DISK = ("dataset_dict.json", "state.json")  # of Hugging Face's save_to_disk
_CARDS = ("README.md", ".huggingface.yaml")
_MAX_CARD = 2**20  # bytes
_OPTIONS = {
    "config_name", "data_files", "data_dir", "default", "description", "drop_labels", "version",
    "sep", "delimiter", "quotechar", "header", "names", "column_names", "field",
}  # fmt: skip
_FORMATS = ("csv", "json", "parquet", "text", "arrow")  # of Hugging Face's library
_TFDS = ("dataset_info.json", "features.json")
_FEATURES = "tensorflow_datasets.core.features."
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")


def is_on_disk(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` of Hugging Face writes."""
    return any(has_file(folder, name) for name in _ON_DISK)


def check_hf(folder: Path) -> None:
    """Checks that a dataset's folder in Hugging Face format names files of its own only.

    Raises:
        DitError: a link or a name leads out of it, a pipe is among its files, or its description cannot be read.
    """
    check_tree(folder)
    for file, said in _data_files(folder):
        for _, text in _texts(said):
            _check_path(file, text)
    for file in walk(folder):
        if file.suffix == ".arrow":
            _check_arrow(file)


def check_opens(folder: Path, builder: Any) -> dict[str, list[Path]]:
    """Checks what Hugging Face's library is about to open, and returns the files of each split if they are Parquet's.

    Raises:
        DitError: they are compressed, and may unpack to anything; of a format that is not known to be safe; or not in
            the folder.
    """
    found = builder.config.data_files or {}
    files = {str(split): [Path(name) for name in names] for split, names in found.items()}
    for file in (file for names in files.values() for file in names):
        if not file.is_relative_to(folder.resolve()):
            raise DitError(f"'{folder}' names {short(str(file))}, which is not in it: fix its card")
        if file.suffix.lower() in COMPRESSED:
            raise DitError(f"'{file}' is compressed: unpack it first")
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in _FORMATS:
        raise DitError(f"'{folder}' holds files of the format '{kind}': write them as JSON lines")
    if len(str(getattr(builder.config, "sep", ","))) != 1:  # a pattern, which may take forever
        raise DitError(f"'{folder}' separates fields by more than a character: use ','")
    return files if kind == "parquet" else {}


def _check_arrow(file: Path) -> None:
    """Arrow reads what a file points at, wherever that is. Raises DitError: it points out of itself."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as data:
            data.seek(8 if data.read(6) == b"ARROW1" else 0)
            for message in pyarrow.ipc.MessageReader.open_stream(data):
                if _is_compressed(message):
                    raise DitError(f"'{file}' is compressed: write it without compression")
            data.seek(0)
            try:
                batches: Any = pyarrow.ipc.open_stream(data)
            except pyarrow.ArrowInvalid:
                reader = pyarrow.ipc.open_file(data)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            for batch in batches:
                batch.validate(full=True)
    except (pyarrow.ArrowException, OSError, struct.error) as error:
        raise DitError(f"cannot read '{file}' as Arrow: {first_line(error)}") from None


def check_tfds(folder: Path) -> None:
    """Checks that a prepared dataset of TFDS names files of its own only, and no class but those of TFDS.

    Raises:
        DitError: as `check_hf`, or a class of another module, which TFDS would import.
    """
    check_tree(folder)
    info, features = (
        (
            folder / name,
            read_json_object(file_inside(folder, name)) if has_file(folder, name) else {},
        )
        for name in _TFDS
    )
    for key, text in _texts(info[1].get("splits")):
        if "template" in key.lower():
            _check_path(info[0], text)
    for key, text in _texts(features[1]):
        if key in _CLASS_KEYS and not text.startswith(_FEATURES):
            raise DitError(
                f"'{features[0]}' names the class {short(text)}, which is none of TFDS: it would be imported, so do "
                "not trust this folder"
            )


def _is_compressed(message: Any) -> bool:
    """Whether the arrays of a message unpack to more than its bytes, which pyarrow tells nobody.

    Source: Message.fbs of Arrow, whose tables FlatBuffers writes.
    """
    data = message.metadata.to_pybytes()

    def field(table: int, number: int) -> int:
        """Where a field of a table lies, 0 if it has none."""
        places = table - struct.unpack_from("<i", data, table)[0]
        size = struct.unpack_from("<H", data, places)[0]
        place = 4 + 2 * number
        offset = struct.unpack_from("<H", data, places + place)[0] if place < size else 0
        return table + offset if offset else 0

    def inner(place: int) -> int:
        return int(place + struct.unpack_from("<I", data, place)[0])

    if message.type not in ("record batch", "dictionary"):
        return False
    batch = inner(field(inner(0), 2))
    if message.type == "dictionary":
        batch = inner(field(batch, 1))
    return field(batch, 3) > 0


def _check_path(file: Path, text: str) -> None:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or ":" in text or text.startswith("~"):
        raise DitError(f"'{file}' names {short(text)}, which is not in its folder: fix the entry")


def _data_files(folder: Path) -> Iterator[tuple[Path, Any]]:
    """(file, what it says of where the data is)."""
    splits: Any = []
    if has_file(folder, _ON_DISK[0]):
        splits = read_json_object(file_inside(folder, _ON_DISK[0])).get("splits")
        yield folder / _ON_DISK[0], splits
    for place in (folder, *(folder / text for _, text in _texts(splits))):
        if place.is_dir() and has_file(place, _ON_DISK[1]):
            file = file_inside(place, _ON_DISK[1])
            yield file, read_json_object(file).get("_data_files")
    for name in _CARDS:
        if has_file(folder, name):
            configs = _card(file_inside(folder, name)).get("configs")
            for config in configs if isinstance(configs, list) else [configs]:
                if isinstance(config, dict):
                    if other := sorted(map(str, config.keys() - _OPTIONS)):
                        raise DitError(
                            f"'{folder / name}' has the option {short(other[0])}, which is not known here: "
                            "write the data as JSON lines"
                        )
                    yield folder / name, [config.get("data_files"), config.get("data_dir")]


def _card(file: Path) -> dict[str, Any]:
    """The YAML of a dataset's card: before its text, or the whole file."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        if file.stat().st_size > _MAX_CARD:
            raise ValueError(f"it has more than {_MAX_CARD} bytes")
        if file.suffix == ".md":
            found = metadata_load(file)
        else:
            found = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DitError(f"'{file}' cannot be read: {first_line(error)}") from None
    return found if isinstance(found, dict) else {}


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """(key of the object that it is in, text) of all texts in a value, and in texts that are JSON themselves.

    YAML may name one value many times: each is looked at once.
    """
    level: list[tuple[str, Any]] = [("", value)]
    seen: set[int] = set()
    while level:
        key, item = level.pop()
        if isinstance(item, str):
            yield key, item
            if item.lstrip().startswith(("{", "[")):
                try:
                    level.append((key, parse_json(item, finite=False)))
                except BadJson:
                    continue
        elif isinstance(item, dict | list) and id(item) not in seen:
            seen.add(id(item))
            inside = item.items() if isinstance(item, dict) else ((key, one) for one in item)
            level += ((str(name), one) for name, one in inside)
