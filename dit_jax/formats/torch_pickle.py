"""Reads `torch.save` files without PyTorch and without executing anything.

Why not the pickle module: it imports and calls what a file names. This small interpreter knows only the instructions
that torch.save writes. It builds dicts, lists, tuples, numbers and strings, and knows the few calls that make an empty
OrderedDict, a size, a tensor (a `LazyTensor`) and a parameter. It never imports, looks up or calls anything that a file
names.
"""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.formats.files import short
from dit_jax.formats.torch_zip import TorchZip

MAX_PICKLE_BYTES = 256 * 2**20
MAX_STRING_BYTES = 2**20
MAX_OPCODES = 50_000_000
MAX_DEPTH = 6  # of the containers that readers walk through
OPCODES_PER_TENSOR = 45  # a parameter takes 42, and hundreds of diffs may share a storage
BYTES_PER_OPCODE = 120  # an instruction of one byte makes a list, a dict or an entry of the memo
# Up to this size, a storage is verified even if a tensor is only a part of it.
CHECKSUM_BYTES = 2**20

_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _Call:
    """A name that a pickle may call, as an inert value."""

    name: str


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int


_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Call("dict"),
    ("torch._utils", "_rebuild_tensor_v2"): _Call("tensor"),
    ("torch._utils", "_rebuild_parameter"): _Call("parameter"),
    # transformers marks its parameters with an attribute, which is not needed.
    ("torch._utils", "_rebuild_parameter_with_state"): _Call("parameter"),
    ("torch", "Size"): _Call("size"),
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class LazyTensor:
    """A tensor in a file: its shape and dtype are known, its values are read by `read`."""

    archive: TorchZip = dataclasses.field(repr=False)
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The values in the dtype of the file, C-contiguous. Only the bytes that the tensor spans are read.

        Raises:
            DitError: the file is truncated, or its checksum is wrong.
        """
        itemsize, name = self.dtype.itemsize, f"data/{self.storage.key}"
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        total = self.storage.size * itemsize
        if span == self.storage.size or total <= CHECKSUM_BYTES:
            raw = self.archive.read(name, total)[self.offset * itemsize :]
        else:
            raw = self.archive.read_at(name, self.offset * itemsize, span * itemsize)
        flat = np.frombuffer(raw, self.dtype, count=span)
        strides = tuple(s * itemsize for s in self.stride)
        view = np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)
        return np.array(view, order="C")


def load(path: str | Path) -> Any:
    """The object in a `torch.save` file: dicts, lists, tuples, numbers, strings and LazyTensors.

    The file is untrusted: nothing in it is executed or imported, and its size bounds memory and time. Containers may
    contain themselves, so walk the result to a fixed depth only.

    Raises:
        DitError: the file is of another kind, is damaged, or holds anything but tensors in plain containers.
    """
    archive = TorchZip(Path(path))
    if "byteorder" in archive.entries and archive.read("byteorder", 16) != b"little":
        raise archive.error("it was saved on a big-endian machine, which is not supported")
    data = archive.read("data.pkl", MAX_PICKLE_BYTES)
    # Real files need a few hundred instructions per storage, so a small file cannot ask for much work.
    limit = 500_000 + 5_000 * len(archive.entries)
    limit = min(limit, budgets.held_bytes(archive.file_size) // BYTES_PER_OPCODE)
    try:
        tree = _Interpreter(archive, data, limit).run()
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error):
        raise archive.error("its pickle is malformed") from None
    _check_aliases(tree, archive)
    return tree


def _check_aliases(tree: Any, archive: TorchZip) -> None:
    """Raises DitError if the tensors, each counted as often as it occurs, hold far more bytes than the file.

    Tied weights share a storage, and so do views of one. A small file in which thousands of tensors are views of the
    same bytes would take any memory.
    """
    most = budgets.held_bytes(archive.file_size)
    nodes, held = MAX_OPCODES, 0
    level = [tree]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if type(node) is LazyTensor:
                held += node.nbytes
            elif type(node) is dict:
                below.extend(node.values())
            elif type(node) in (list, tuple):
                below.extend(node)
            if len(below) > nodes or held > most:
                raise archive.error(
                    f"its tensors share storages, and hold more than the {most >> 20} MB that its size allows"
                )
        nodes -= len(below)
        level = below


class _Interpreter:
    """One pass over a pickle. Malformed input raises builtin errors, which `load` translates."""

    def __init__(self, archive: TorchZip, data: bytes, limit: int):
        self.archive, self.data, self.limit = archive, data, limit
        self.storages: dict[str, _Storage] = {}

    def run(self) -> Any:
        data, end = self.data, len(self.data)
        memo: dict[int, Any] = {}
        stack: list[Any] = []
        marks: list[list[Any]] = []
        position, steps = 0, 0
        while True:
            steps += 1
            if steps > self.limit or steps > MAX_OPCODES:
                raise self.archive.error("its pickle has too many instructions for its size")
            op = data[position]
            position += 1
            if op == 0x72:  # LONG_BINPUT
                memo[int.from_bytes(data[position : position + 4], "little")] = stack[-1]
                position += 4
            elif op == 0x4B:  # BININT1
                stack.append(data[position])
                position += 1
            elif op == 0x68:  # BINGET
                stack.append(memo[data[position]])
                position += 1
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[int.from_bytes(data[position : position + 4], "little")])
                position += 4
            elif op == 0x71:  # BINPUT
                memo[data[position]] = stack[-1]
                position += 1
            elif op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op == 0x28:  # MARK
                marks.append(stack)
                stack = []
            elif op == 0x74:  # TUPLE
                value = tuple(stack)
                stack = marks.pop()
                stack.append(value)
            elif op in (0x85, 0x86, 0x87):  # TUPLE1, TUPLE2, TUPLE3
                count = op - 0x84
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            elif op == 0x52:  # REDUCE
                arguments = stack.pop()
                stack[-1] = self._reduce(stack[-1], arguments)
            elif op == 0x51:  # BINPERSID
                stack[-1] = self._storage(stack[-1])
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x88:  # NEWTRUE
                stack.append(True)
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x7D:  # EMPTY_DICT
                stack.append({})
            elif op == 0x5D:  # EMPTY_LIST
                stack.append([])
            elif op in (0x58, 0x8C):  # BINUNICODE, SHORT_BINUNICODE
                width = 4 if op == 0x58 else 1
                length = int.from_bytes(data[position : position + width], "little")
                position += width
                if length > MAX_STRING_BYTES:
                    raise self.archive.error(f"its pickle has a string of {length} bytes")
                if position + length > end:
                    raise IndexError
                stack.append(data[position : position + length].decode("utf-8"))
                position += length
            elif op == 0x4D:  # BININT2
                stack.append(struct.unpack_from("<H", data, position)[0])
                position += 2
            elif op == 0x4A:  # BININT
                stack.append(struct.unpack_from("<i", data, position)[0])
                position += 4
            elif op == 0x8A:  # LONG1
                length = data[position]
                if length > 8:
                    raise ValueError
                position += 1
                stack.append(
                    int.from_bytes(data[position : position + length], "little", signed=True)
                )
                position += length
            elif op == 0x47:  # BINFLOAT
                stack.append(struct.unpack_from(">d", data, position)[0])
                position += 8
            elif op == 0x73:  # SETITEM
                value, key = stack.pop(), stack.pop()
                self._set_items(stack[-1], [key, value])
            elif op == 0x75:  # SETITEMS
                items = stack
                stack = marks.pop()
                self._set_items(stack[-1], items)
            elif op in (0x61, 0x65):  # APPEND, APPENDS
                items = [stack.pop()] if op == 0x61 else stack
                stack = stack if op == 0x61 else marks.pop()
                if type(stack[-1]) is not list:
                    raise TypeError
                stack[-1].extend(items)
            elif op == 0x63:  # GLOBAL
                middle = data.index(b"\n", position, position + 512)
                last = data.index(b"\n", middle + 1, middle + 513)
                names = data[position:middle].decode(), data[middle + 1 : last].decode()
                stack.append(self._global(*names))
                position = last + 1
            elif op == 0x93:  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                stack.append(self._global(module, name))
            elif op == 0x62:  # BUILD
                # A state dict carries version numbers as attributes, which are not needed.
                state = stack.pop()
                if type(stack[-1]) is not dict or type(state) is not dict:
                    raise self.archive.error("its pickle builds an object, which is not allowed")
            elif op == 0x80:  # PROTO
                if data[position] > 5:
                    raise ValueError
                position += 1
            elif op == 0x95:  # FRAME
                position += 8
            elif op == 0x2E:  # STOP
                if position != end or len(stack) != 1 or marks:
                    raise ValueError
                return stack[0]
            else:
                raise self.archive.error(
                    f"its pickle uses the instruction 0x{op:02x}, which is not allowed"
                )

    def _global(self, module: Any, name: Any) -> Any:
        # Hashing nested tuples would recurse without a limit of depth.
        if type(module) is not str or type(name) is not str:
            raise TypeError
        found = _GLOBALS.get((module, name))
        if found is None:
            raise DitError(
                f"'{self.archive.path}' refers to {short(f'{module}.{name}')}, which is not "
                "allowed in weights: do not trust this file (plain tensors in lists, tuples and "
                "dicts are read)"
            )
        return found

    def _set_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing nested tuples would recurse without a limit of depth.
            if type(key) not in (str, int, bool, float, type(None)):
                raise TypeError
            target[key] = value

    def _reduce(self, function: Any, arguments: Any) -> Any:
        if type(function) is not _Call or type(arguments) is not tuple:
            raise self.archive.error("its pickle makes a call that is not allowed")
        if function.name == "dict" and arguments == ():
            return {}
        # Only a tuple: a list would be copied by each call, and a call takes only a few bytes.
        if function.name == "size" and len(arguments) == 1 and type(arguments[0]) is tuple:
            return arguments[0]
        if function.name == "parameter" and type(arguments[0]) is LazyTensor:
            return arguments[0]
        if function.name == "tensor" and len(arguments) in (6, 7):
            # Metadata marks values that must be negated or conjugated when they are read.
            if len(arguments) == 7 and arguments[6] is not None and arguments[6] != {}:
                raise self.archive.error(
                    "a tensor is marked as negated or conjugated, which is not supported"
                )
            self.limit += OPCODES_PER_TENSOR
            return self._tensor(*arguments[:4])
        raise self.archive.error("its pickle makes a call that is not allowed")

    def _storage(self, identity: Any) -> _Storage:
        kind, storage_type, key, _, size = identity
        if kind != "storage" or type(storage_type) is not _StorageType or type(key) is not str:
            raise ValueError
        known = self.storages.get(key)
        if known is None:
            entry = self.archive.entries.get(f"data/{key}")
            if entry is None:
                raise self.archive.error(f"the archive lacks the values of storage {short(key)}")
            known = self.storages[key] = _Storage(key, storage_type.dtype, size)
            if type(size) is not int or size < 0 or size * known.dtype.itemsize != entry.size:
                raise self.archive.error(
                    f"storage {short(key)} does not have the size that the pickle says"
                )
        if (known.dtype, known.size) != (storage_type.dtype, size):
            raise self.archive.error(f"storage {short(key)} is described in two ways")
        return known

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> LazyTensor:
        if type(storage) is not _Storage or type(shape) is not tuple or type(stride) is not tuple:
            raise TypeError
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or len(shape) > 8:
            raise ValueError
        if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers):
            raise self.archive.error("a tensor has an impossible shape, stride or offset")
        count, last = 1, offset
        for n, s in zip(shape, stride, strict=True):
            count *= n
            last += (n - 1) * s
        # An expanded tensor (stride 0) could unfold a few bytes to any size.
        if count and (last >= storage.size or count > storage.size):
            raise self.archive.error("a tensor reaches outside its storage")
        return LazyTensor(self.archive, storage, offset, shape, stride)
