"""Reads the zip container of `torch.save` files strictly: entries must be stored as they are and must not overlap.

Why not the standard zipfile module: it takes ten times the memory and time for the 100,000 entries of a release file,
and it accepts archives whose entries share bytes.
"""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dit_jax.errors import DitError
from dit_jax.formats.files import regular_file, short
from dit_jax.formats.recognise import HEAD_BYTES, what_file

MAX_DIRECTORY_BYTES = 512 * 2**20
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # entry of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # header in front of the data


class Entry(NamedTuple):
    """One stored file of the archive: where its local header is, its size and its checksum."""

    header: int
    size: int
    crc: int


class TorchZip:
    """The entries of a `torch.save` file by their names below the archive's own folder.

    Args:
        path: the file.

    Raises:
        DitError: at construction, if the file is not a zip file (torch's old format included), its directory is wrong,
            or its entries overlap, repeat, or are compressed or encrypted.
    """

    def __init__(self, path: Path):
        self.path = regular_file(path)
        try:
            with open(path, "rb") as handle:
                self._size = handle.seek(0, 2)
                self.entries, self._root = self._read_directory(handle)
        except OSError as error:
            raise DitError(f"cannot read '{path}': {error.strerror}") from None
        except (struct.error, IndexError):
            raise self.error("its directory is truncated") from None

    def error(self, problem: str) -> DitError:
        """A DitError that names the file and says to get it again."""
        return DitError(f"'{self.path}' cannot be read: {problem}; get the file again")

    @property
    def file_size(self) -> int:
        return self._size

    def read(self, name: str, max_bytes: int) -> bytes:
        """The content of an entry, its checksum verified. Raises DitError if it is wrong."""
        entry = self.entries.get(name)
        if entry is None:
            raise self.error(f"the archive lacks {short(name)}")
        if entry.size > max_bytes:
            raise self.error(f"{short(name)} has {entry.size} bytes, more than {max_bytes}")
        content = self.read_at(name, 0, entry.size)
        self.check(name, content)
        return content

    def check(self, name: str, content: bytes) -> None:
        """Raises DitError if `content` is not what was stored under `name`."""
        if zlib.crc32(content) != self.entries[name].crc:
            raise self.error(
                f"the checksum of {short(name)} is wrong (damaged, or saved without one)"
            )

    def read_at(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes of an entry from `start`. Only these bytes are read."""
        entry = self.entries[name]
        if start < 0 or size < 0 or start + size > entry.size:
            raise self.error(f"{short(name)} is shorter than it should be")
        try:
            with open(self.path, "rb") as handle:
                handle.seek(entry.header)
                header = handle.read(_LOCAL.size)
                signature, *_, name_size, extra_size = _LOCAL.unpack(header)
                full = f"{self._root}/{name}".encode()
                if signature != b"PK\3\4" or handle.read(name_size) != full:
                    raise self.error(f"its directory is wrong about {short(name)}")
                data = entry.header + _LOCAL.size + name_size + extra_size
                if data + entry.size > self._limit:
                    raise self.error(f"its directory is wrong about {short(name)}")
                handle.seek(data + start)
                content = handle.read(size)
        except OSError as error:
            raise DitError(f"cannot read '{self.path}': {error.strerror}") from None
        except struct.error:
            raise self.error("it is truncated") from None
        if len(content) != size:
            raise self.error("it is truncated")
        return content

    def _read_directory(self, handle: BinaryIO) -> tuple[dict[str, Entry], str]:
        handle.seek(0)
        magic = handle.read(len(LEGACY_MAGIC))
        if magic == LEGACY_MAGIC:
            raise DitError(
                f"'{self.path}' is in torch's old format (not zip), which is not supported: load it "
                "with torch.load and save it again with torch.save"
            )
        if not magic.startswith(b"PK\3\4"):
            handle.seek(0)
            if what := what_file(handle.read(HEAD_BYTES)):
                raise DitError(f"'{self.path}' {what}")
            raise DitError(
                f"'{self.path}' is not a file that torch.save wrote (no zip archive): give a .pt file, or "
                "the folder of an adapter or a model"
            )
        offset, size, count = self._find_directory(handle)
        if size > MAX_DIRECTORY_BYTES or offset + size > self._size or count * _ENTRY.size > size:
            raise self.error("its directory is wrong")
        self._limit = offset
        handle.seek(offset)
        directory = handle.read(size)
        named: dict[str, Entry] = {}
        position = 0
        for _ in range(count):
            name, entry, position = self._parse_entry(directory, position)
            if name in named:
                raise self.error(f"{short(name)} occurs twice")
            named[name] = entry
        if position != size:
            raise self.error("its directory is wrong")
        return self._check_entries(named)

    def _find_directory(self, handle: BinaryIO) -> tuple[int, int, int]:
        """Offset, size and number of entries of the central directory."""
        start = max(0, self._size - _END.size - 0xFFFF)
        handle.seek(start)
        tail = handle.read(_END.size + 0xFFFF)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(tail):
            raise self.error("it is truncated (no zip directory)")
        _, disk, first, here, count, size, offset, comment = _END.unpack_from(tail, at)
        if disk or first or here != count or at + _END.size + comment != len(tail):
            raise self.error("its directory is wrong")
        if 0xFFFFFFFF in (size, offset) or count == 0xFFFF:
            handle.seek(max(0, start + at - _LOCATOR64.size))
            signature, _, position, _ = _LOCATOR64.unpack(handle.read(_LOCATOR64.size))
            if signature != b"PK\6\7" or position + _END64.size > self._size:
                raise self.error("its directory is wrong")
            handle.seek(position)
            fields = _END64.unpack(handle.read(_END64.size))
            if fields[0] != b"PK\6\6":
                raise self.error("its directory is wrong")
            count, size, offset = fields[7:10]
        return offset, size, count

    def _parse_entry(self, directory: bytes, position: int) -> tuple[str, Entry, int]:
        fields = _ENTRY.unpack_from(directory, position)
        signature, flags, method, crc, packed, size = fields[0], *fields[3:5], *fields[7:10]
        name_size, extra_size, comment_size, header = *fields[10:13], fields[16]
        if signature != b"PK\1\2":
            raise self.error("its directory is wrong")
        position += _ENTRY.size
        raw = directory[position : position + name_size]
        extra = directory[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        if position > len(directory):
            raise self.error("its directory is truncated")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error("an entry's name is not text") from None
        if "/code/" in name or name.endswith("/constants.pkl"):
            raise DitError(f"'{self.path}' is a TorchScript program, which is not supported")
        if flags & 1:
            raise self.error(f"{short(name)} is encrypted, which is not supported")
        if method != 0:
            raise self.error(f"{short(name)} is compressed, which torch.save never does")
        if 0xFFFFFFFF in (packed, size, header):
            size, packed, header = self._zip64(extra, size, packed, header)
        if packed != size:
            raise self.error("its directory is wrong")
        return name, Entry(header, size, crc), position

    def _zip64(self, extra: bytes, size: int, packed: int, header: int) -> tuple[int, ...]:
        """The 64-bit values of an entry, in the order of the zip64 extra field."""
        position = 0
        while position + 4 <= len(extra):
            tag, length = struct.unpack_from("<HH", extra, position)
            if tag == 1:
                field = extra[position + 4 : position + 4 + length]
                numbers = iter(
                    [n for (n,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
                )
                try:
                    return tuple(
                        next(numbers) if value == 0xFFFFFFFF else value
                        for value in (size, packed, header)
                    )
                except (StopIteration, RuntimeError):
                    break
            position += 4 + length
        raise self.error("its directory is wrong")

    def _check_entries(self, named: dict[str, Entry]) -> tuple[dict[str, Entry], str]:
        """Entries without the archive's folder name, after a check that no two share bytes."""
        end = 0
        for name, entry in sorted(named.items(), key=lambda item: item[1].header):
            if entry.header < end or entry.size > self._limit:
                raise self.error(f"{short(name)} overlaps another entry")
            end = entry.header + _LOCAL.size + len(name.encode()) + entry.size
        if end > self._limit:
            raise self.error("its directory is wrong")
        pickles = [name for name in named if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise DitError(f"'{self.path}' is not a file that torch.save wrote (no data.pkl in it)")
        root = pickles[0].partition("/")[0]
        prefix = f"{root}/"
        if outside := [name for name in named if not name.startswith(prefix)]:
            raise self.error(
                f"{short(outside[0])} is outside the folder {short(prefix)} of the archive"
            )
        return {n[len(prefix) :]: e for n, e in named.items()}, root
