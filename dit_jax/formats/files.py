"""Opens files of untrusted folders: only files inside the folder are read, and only up to a size limit.

Every path, JSON file and CSV file of a foreign weight diff passes through here.
"""

import codecs
import contextlib
import csv
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.recognise import HEAD_BYTES, what_file, what_separator, what_table

MAX_JSON_BYTES = 16 * 2**20
MAX_CSV_BYTES = 64 * 2**20
MAX_STREAM_BYTES = 64 * 2**20  # of what has no size: a pipe, a device
MAX_CSV_COLUMNS = 1_000
MAX_CSV_FIELDS = 5_000_000


def short(value: object, limit: int = 80) -> str:
    """An untrusted value for a message: text cut to `limit` characters, a number, or the name of another type."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[:limit] + "…")
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 256 else "a huge integer"
    return f"a {type(value).__name__}"


def is_plain_name(name: object) -> bool:
    """Whether `name` is a plain file name, and not a path that could lead elsewhere."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not any(char in name for char in "/\\\0")
    )


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: "~" is the home folder. One of an unknown user, "~nobody", is a name like any."""
    return Path(os.path.expanduser(text))


def regular_file(path: Path) -> Path:
    """Returns `path` if it leads to a regular file, which can be opened without waiting.

    Raises:
        DitError: nothing there, or a folder, pipe, socket or device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        raise DitError(f"'{path}' is missing or cannot be reached: check the path") from None
    if not stat.S_ISREG(mode):
        raise DitError(f"'{path}' is not a regular file: replace it by the real file")
    return path


def no_device(path: Path) -> Path:
    """Returns `path`. Raises DitError if it is a pipe, socket or device: to open one may wait forever.

    What a shell writes for `<(command)` is in /dev, and is meant.
    """
    if path.exists() and not path.is_dir() and not path.is_relative_to("/dev"):
        regular_file(path)
    return path  # a dangling link is missing where it is needed


def read_bytes(path: Path) -> bytes:
    """A whole text file, or the pipe of `<(command)`. Raises OSError; DitError: see `no_device`, or it is too large."""
    with open(no_device(path), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            return read_stream(file, f"'{path}'")
        if state.st_size > budgets.MAX_TEXT_BYTES:
            raise DitError(
                f"'{path}' has {state.st_size} bytes, and a text may have {budgets.MAX_TEXT_BYTES}: check what it is"
            )
        return file.read()


def read_stream(file: BinaryIO, name: str) -> bytes:
    """What a pipe or a device holds. Raises DitError: it is too much."""
    data = file.read(MAX_STREAM_BYTES + 1)
    if len(data) > MAX_STREAM_BYTES:
        raise DitError(f"{name} has more than {MAX_STREAM_BYTES} bytes: give a file")
    return data


def file_inside(folder: Path, name: object, source: object = None) -> Path:
    """The regular file `name` of `folder`.

    A symbolic link may lead only to a file in the folder or, in a snapshot of the Hugging Face cache
    (`models--x/snapshots/<revision>`), to the `blobs` of the same model or dataset.

    Args:
        folder: the folder that the user named.
        name: a plain file name, possibly from an untrusted index.
        source: the file that gave the name, for messages.

    Raises:
        DitError: not a plain file name, no regular file, or a link out of the folder.
    """
    said = f"'{source}' names" if source else "asked for"
    if not is_plain_name(name):
        raise DitError(
            f"{said} the file {short(name)}, which is not a plain file name: fix the entry"
        )
    return file_below(folder, folder / str(name))


def check_no_devices(folder: Path) -> None:
    """Raises DitError if a pipe, socket or device is among a folder's files."""
    for place in (folder, folder / "additional_chat_templates"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted(place.iterdir()):
                no_device(path)


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder but plain folders; links to folders are not followed.

    Raises:
        DitError: there are more files, or folders deeper in each other, than any artifact has; or one cannot be read.
    """
    level, count = [folder], 0
    for _ in range(budgets.MAX_FOLDER_DEPTH):
        below: list[Path] = []
        for place in level:
            try:
                entries = [
                    (path, path.is_symlink() or not path.is_dir())
                    for path in sorted(place.iterdir())
                ]
            except OSError as error:
                raise DitError(f"cannot read '{place}': {error.strerror}") from None
            for path, is_file in entries:
                count += 1
                if count > budgets.MAX_FOLDER_ENTRIES:
                    raise DitError(f"'{folder}' holds more than {count - 1} files: check the path")
                if is_file:
                    yield path
                else:
                    below.append(path)
        if not below:
            return
        level = below
    raise DitError(
        f"'{folder}' has folders more than {budgets.MAX_FOLDER_DEPTH} deep in each other: get it again"
    )


def check_tree(folder: Path) -> None:
    """Raises DitError if anything below a folder is a link out of it, a pipe or a device."""
    for path in walk(folder):
        file_below(folder, path)


def file_below(folder: Path, path: Path) -> Path:
    """`path`, which may be a link as in `file_inside`. Raises DitError: it leads out of the folder, or to no file."""
    try:
        root, target = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise DitError(f"'{path}' is missing: get the complete folder") from None
    allowed = [root]
    for revision in (root, *root.parents):
        if revision.parent.name == "snapshots" and revision.parent.parent.name.startswith(
            ("models--", "datasets--")
        ):
            allowed.append(revision.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise DitError(f"'{path}' is a link out of its folder: put the real file there")
    return regular_file(path)


def has_file(folder: Path, name: str) -> bool:
    """Whether the folder has an entry of that name, even if it is a dangling link."""
    return os.path.lexists(folder / name)


def check_links(folder: Path) -> None:
    """Raises DitError if an entry with weights or JSON is a link out of the folder or not a regular file."""
    try:
        entries = sorted(os.listdir(folder))
    except OSError as error:
        raise DitError(f"cannot read '{folder}': {error.strerror}") from None
    for entry in entries:
        if entry.endswith((".safetensors", ".bin", ".json")):
            file_inside(folder, entry)


def read_json_object(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `max_bytes`.

    Raises:
        DitError: the file is unreadable, too large, not UTF-8, not JSON, nested too deeply, not an object, or has a
            repeated key.
    """
    try:
        with open(regular_file(path), "rb") as handle:
            raw = handle.read(max_bytes + 1)
    except OSError as error:
        raise DitError(f"cannot read '{path}': {error.strerror}") from None
    if len(raw) > max_bytes:
        raise DitError(
            f"'{path}' is larger than {max_bytes} bytes: it cannot be the right file, get it again"
        )
    try:
        value = parse_json(decode(raw), finite=False)
    except (BadJson, UnicodeDecodeError) as error:
        what = (
            what_file(raw)
            or f"{error if isinstance(error, BadJson) else 'is not UTF-8 text'}: get the file again"
        )
        raise DitError(f"'{path}' {what}") from None
    if not isinstance(value, dict):
        raise DitError(f"'{path}' is not a JSON object: get the file again")
    return value


# Byte-order marks, which editors write; that of UTF-32 begins with that of UTF-16.
_MARKS = tuple(
    (mark, codecs.lookup(encoding))
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    )
)


def is_decoded(text: str) -> bool:
    """Whether a text holds no halves of characters."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def decode(raw: bytes) -> str:
    """Text by its byte-order mark, without that; UTF-8 if there is none. Raises UnicodeDecodeError."""
    for mark, codec in _MARKS:
        if raw.startswith(mark):
            return codec.decode(raw[len(mark) :])[0]
    return raw.decode("utf-8")


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file with a header that has at least `columns`.

    Raises:
        DitError: the file is unreadable or too large, columns are missing, a row has too few or too many fields, or a
            field exceeds the limit of the csv module (131,072 characters).
    """
    if regular_file(path).stat().st_size > MAX_CSV_BYTES:
        raise DitError(f"'{path}' is larger than {MAX_CSV_BYTES} bytes: it cannot be an index")
    rows: list[dict[str, str]] = []
    try:
        with open(path, "rb") as binary:
            if what := what_table(binary.read(HEAD_BYTES)):
                raise DitError(f"'{path}' {what}")
        with open(path, encoding="utf-8", newline="") as handle:
            if handle.read(1) != "\ufeff":  # the byte-order mark that spreadsheets write
                handle.seek(0)
            # A third faster than csv.DictReader, for indexes of 100,000 rows.
            reader = csv.reader(handle, strict=True)
            names = next(reader, [])
            if len(names) > MAX_CSV_COLUMNS or len(set(names)) < len(names):
                raise DitError(
                    f"'{path}' has {len(names)} columns with {len(set(names))} different names: "
                    f"at most {MAX_CSV_COLUMNS}, all different, are read"
                )
            missing = [c for c in columns if c not in names]
            if missing and (what := what_separator(names)):
                raise DitError(f"'{path}' {what}")
            if missing:
                raise DitError(
                    f"'{path}' lacks the column {missing[0]!r}: expected {list(columns)}"
                )
            for fields in filter(None, reader):
                if len(fields) != len(names):
                    raise DitError(
                        f"'{path}' line {reader.line_num} does not have the header's fields"
                    )
                rows.append(dict(zip(names, fields, strict=True)))
                if len(rows) * len(names) > MAX_CSV_FIELDS:
                    raise DitError(
                        f"'{path}' has more than {MAX_CSV_FIELDS} fields: it cannot be an index"
                    )
    except UnicodeDecodeError:
        raise DitError(f"'{path}' is not UTF-8 text: get the file again") from None
    except csv.Error as error:
        raise DitError(f"'{path}' is not a valid CSV file ({error}): get the file again") from None
    except OSError as error:
        raise DitError(f"cannot read '{path}': {error.strerror}") from None
    return rows
