"""Writes `torch.save` files without PyTorch, which only the tests need; `torch.load(weights_only=True)` reads them."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.errors import DitError

_ALIGNMENT = 64  # torch aligns the data of every storage, so that files can be memory-mapped
_STORAGE_NAMES = {
    np.dtype(np.float64): b"DoubleStorage",
    np.dtype(np.float32): b"FloatStorage",
    np.dtype(np.float16): b"HalfStorage",
    np.dtype(ml_dtypes.bfloat16): b"BFloat16Storage",
    np.dtype(np.int64): b"LongStorage",
    np.dtype(np.int32): b"IntStorage",
}

_Arrays = dict[int, tuple[int, np.ndarray]]  # id of an array -> its number, and the array


def save(path: str | Path, value: Any, name: str = "archive") -> None:
    """Writes nested lists, tuples and dicts (str keys) of arrays, strings, numbers and None.

    Args:
        path: the file to write.
        value: arrays are stored in their dtype, C-contiguous; an array that occurs twice is stored once.
        name: the archive's folder; torch uses the name of the file without its suffix.

    Raises:
        DitError: torch has no storage type for the dtype of an array.
        TypeError: a value has another type.
    """
    arrays: _Arrays = {}
    pickle = b"\x80\x02" + _encode(value, arrays) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write(archive, f"{name}/data.pkl", pickle)
        _write(archive, f"{name}/byteorder", b"little")
        for index, array in arrays.values():
            _write(archive, f"{name}/data/{index}", array.tobytes())
        _write(archive, f"{name}/version", b"3\n")


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name)
    assert archive.fp is not None
    data = archive.fp.tell() + 30 + len(name.encode()) + 4
    padding = -data % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
    archive.writestr(entry, content)


def _encode(value: Any, arrays: _Arrays) -> bytes:
    """`value` in pickle protocol 2. Arrays are added to `arrays` and referred to by number."""
    if isinstance(value, np.ndarray):
        return _encode_tensor(value, arrays)
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode(errors="backslashreplace")  # half a character
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, tuple):
        return b"(" + b"".join(_encode(item, arrays) for item in value) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(_encode(item, arrays) for item in value) + b"e"
    if isinstance(value, dict):
        items = (_encode(k, arrays) + _encode(v, arrays) for k, v in value.items())
        return b"}(" + b"".join(items) + b"u"
    raise TypeError(f"cannot write a {type(value).__name__}")


def _encode_tensor(array: np.ndarray, arrays: _Arrays) -> bytes:
    kind = _STORAGE_NAMES.get(array.dtype)
    if kind is None:
        raise DitError(
            f"torch files cannot hold {array.dtype}: convert the delta to float32 or bfloat16"
        )
    index, _ = arrays.setdefault(id(array), (len(arrays), array))
    strides = [1] * array.ndim
    for axis in range(array.ndim - 2, -1, -1):
        strides[axis] = strides[axis + 1] * array.shape[axis + 1]
    storage = (
        b"(" + _encode("storage", arrays) + b"ctorch\n" + kind + b"\n" + _encode(str(index), arrays)
        + _encode("cpu", arrays) + _encode(int(array.size), arrays) + b"tQ"
    )  # fmt: skip
    rest = (0, tuple(array.shape), tuple(strides), False)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
        + b"".join(_encode(item, arrays) for item in rest)
        + b"ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
