"""Reads safetensors files strictly and lazily: checks the whole header, then reads single tensors or slices.

Why not the safetensors library: it cannot give bfloat16 to numpy, and an untrusted file must fail before anything is
allocated for it. Writing uses the library.
"""

import os
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.recognise import HEAD_BYTES, QUANTISED, what_file

MAX_HEADER_BYTES = 16 * 2**20
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class SafetensorsFile:
    """One file: `names`, `shape(name)`, `read(name)`, `read_row(name, i)` (one entry of the leading axis).

    Raises:
        DitError: at construction, if the file is not a well-formed safetensors file. Sizes, offsets, overlaps and
            dtypes are checked, and nothing but the header is read.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        try:
            with open(self.path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                    f.seek(0)
                    if what := what_file(f.read(HEAD_BYTES)):
                        raise DitError(f"'{self.path}' {what}")
                    raise self._error("the header is truncated or its length is wrong")
                header = parse_json(f.read(length))
        except OSError as e:
            raise DitError(f"{self.path}: cannot be read: {e.strerror}") from None
        except BadJson as e:
            raise self._error(f"the header {e}") from None
        if not isinstance(header, dict):
            raise self._error("the header is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict):
            raise self._error("the metadata is not a JSON object")
        self._start = 8 + length
        self._entries: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        self._parse(header, size - self._start)

    def _parse(self, header: dict[str, Any], data_size: int) -> None:
        spans = []
        for name, entry in header.items():
            try:
                dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            except (TypeError, KeyError, ValueError):
                raise self._error(f"the entry of tensor {name[:80]!r} is malformed") from None
            if isinstance(dtype, str) and re.fullmatch(r"(F8|F6|F4)_\w{1,16}", dtype):
                raise DitError(
                    f"'{self.path}': tensor {name[:80]!r} has the dtype {dtype}: {QUANTISED}"
                )
            if not isinstance(dtype, str) or dtype not in _DTYPES:
                raise self._error(
                    f"tensor {name[:80]!r} has the unsupported dtype {str(dtype)[:20]!r}"
                )
            numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
            if len(numbers) > 16 or any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
                raise self._error(f"tensor {name[:80]!r} has an impossible shape or offset")
            count = 1
            for n in shape:
                count *= n
            if (
                begin > end
                or end > data_size
                or end - begin != count * np.dtype(_DTYPES[dtype]).itemsize
            ):
                raise self._error(f"tensor {name[:80]!r} has a shape that does not fit its bytes")
            spans.append((begin, end))
            self._entries[name] = (np.dtype(_DTYPES[dtype]), tuple(shape), self._start + begin)
        position = 0
        for begin, end in sorted(spans):
            if begin != position:
                raise self._error("tensors overlap or leave gaps")
            position = end
        if position != data_size:
            raise self._error(
                f"the file holds {data_size} bytes of data, its header describes {position}"
            )

    def _error(self, problem: str) -> DitError:
        return DitError(
            f"{self.path}: {problem}: the file is damaged or not a safetensors file; get it again"
        )

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape, _) in self._entries.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        return {name: dtype for name, (dtype, _, _) in self._entries.items()}

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name][0]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in the dtype of the file."""
        dtype, shape, offset = self._entries[name]
        return self._load(dtype, shape, offset)

    def read_row(self, name: str, row: int) -> np.ndarray:
        """Entry `row` of the leading axis. Only its own bytes are read."""
        dtype, shape, offset = self._entries[name]
        rows = shape[0] if shape else 0
        if not 0 <= row < rows:
            raise DitError(f"{self.path}: {name} has {rows} rows, so there is no row {row}")
        stride = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        return self._load(dtype, shape[1:], offset + row * stride)

    def _load(self, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        try:
            flat = np.fromfile(self.path, dtype=dtype, count=count, offset=offset)
        except OSError as e:
            raise DitError(f"{self.path}: cannot be read: {e.strerror}") from None
        if flat.size != count:
            raise self._error("the file became shorter while it was read")
        return flat.reshape(shape)
