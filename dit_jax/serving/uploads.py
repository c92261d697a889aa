"""Uploaded zip files: unpacked within limits, into a folder that is deleted again. Nothing of them is executed."""

import contextlib
import dataclasses
import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import is_plain_name, short
from dit_jax.runtime.artifacts import TemporaryFolder
from dit_jax.runtime.os_errors import reason

_PIECE = 2**20
_MOST_AT_ONCE = 2**22  # bytes; the table of an archive is read at once


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one upload may hold.

    packed: bytes of the file; unpacked: bytes of all that is in it; entries: files and folders; depth: of folders.
    """

    packed: int = 512 * 2**20
    unpacked: int = 2**31
    entries: int = 2000
    depth: int = 8


class _InPieces(io.FileIO):
    """A file of which nothing large is read at once: zipfile makes an object of each 46 bytes of a table."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > _MOST_AT_ONCE:
            raise zipfile.BadZipFile("its table is too large")
        return super().read(size)


@contextlib.contextmanager
def unpacked(path: Path, limits: Limits) -> Iterator[Path]:
    """The folder with the content of a zip file, for as long as the context lasts.

    Raises:
        DitError: it is no zip file, exceeds a limit, or holds anything but plain files in folders below it.
    """
    with TemporaryFolder("dit_jax-upload-") as folder:
        try:
            with (
                _InPieces(_small_enough(path, limits)) as file,
                zipfile.ZipFile(file) as archive,
            ):
                members = archive.infolist()
                _check(members, limits)
                _extract(archive, members, Path(folder), limits)
        except (
            zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError, OverflowError, struct.error
        ) as error:  # fmt: skip
            raise DitError(
                f"the upload is no zip file that can be read ({first_line(error)}): pack it anew"
            ) from None
        yield Path(folder)


def _small_enough(path: Path, limits: Limits) -> Path:
    try:
        size = path.stat().st_size
    except FileNotFoundError:  # the server keeps uploads for an hour
        raise DitError("the upload is no longer there: upload it again") from None
    if size > limits.packed:
        raise DitError(
            f"the upload has {size:,} bytes, and {limits.packed:,} are allowed: give a path or a hub id"
        )
    return path


def _check(members: list[zipfile.ZipInfo], limits: Limits) -> None:
    """Refuses by what the table of the archive says, before anything is unpacked."""
    if len(members) > limits.entries:
        raise DitError(f"the upload has {len(members)} entries: at most {limits.entries} are taken")
    said = sum(member.file_size for member in members)
    if said > limits.unpacked:
        raise _too_large(limits)
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        parts = PurePosixPath(member.orig_filename).parts
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DitError("the upload is packed in an unusual way: pack it with plain zip")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "a link" if kind == stat.S_IFLNK else "no plain file"
            raise DitError(
                f"the upload's entry {short(member.filename)} is {what}: pack plain files"
            )
        if not parts or len(parts) > limits.depth or not all(map(is_plain_name, parts)):
            raise DitError(
                f"the upload's entry {short(member.orig_filename)} is no path below the zip file, at most "
                f"{limits.depth} deep: pack the folder anew"
            )


def _extract(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path, limits: Limits
) -> None:
    """Writes the files, and counts what really comes out: the table of an archive may lie."""
    left = limits.unpacked
    for member in members:
        place = folder.joinpath(*PurePosixPath(member.orig_filename).parts)
        try:
            if member.is_dir():
                place.mkdir(parents=True, exist_ok=True)
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(place, "xb") as target:
                while piece := source.read(_PIECE):
                    left -= len(piece)
                    if left < 0:
                        raise _too_large(limits)
                    target.write(piece)
        except (FileExistsError, NotADirectoryError):
            raise DitError(f"the upload has {short(member.filename)} twice: pack it anew") from None
        except OSError as error:  # a name of too many bytes, a full disk
            raise DitError(
                f"the upload's entry {short(member.filename)} cannot be unpacked: {reason(error.errno or 0)}"
            ) from None


def _too_large(limits: Limits) -> DitError:
    return DitError(
        f"the upload unpacks to more than {limits.unpacked:,} bytes: give a path or a hub id"
    )
