"""Artifacts on disk: atomic writes, digests of files, and manifests.

Readers see a file or a folder whole or not at all: everything is written under a temporary name in
the same folder, flushed to the disk, and renamed. Failures of the file system are DitErrors.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import dit_jax
from dit_jax.errors import DitError
from dit_jax.formats.files import decode, read_bytes, regular_file
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.json_shape import each, fits
from dit_jax.runtime import interrupts
from dit_jax.runtime.os_errors import explain_os_errors
from dit_jax.runtime.outgoing import json_text

PathLike = str | os.PathLike[str]

MANIFEST = "manifest.json"
_TEMPORARY = ".*.tmp-" + "[0-9a-f]" * 12  # what `_temporary_sibling` names
MAX_NAME = 255  # bytes of a file's name: file systems refuse longer ones
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# ------------------------------------------------------------------ atomic files and folders


def make_dir(path: PathLike) -> Path:
    """Makes a folder and its parents if they do not exist. Raises DitError: the file system refuses."""
    with explain_os_errors("make the folder", path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def _temporary_sibling(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:12]}"


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _unfinished(temporary: Path) -> Iterator[None]:
    """Makes a temporary folder, which ends with the context, at the latest with the process.

    Its lock says that its writer is at work; the system releases it, whatever ends the process.
    """
    interrupts.unfinished.add(temporary)
    try:
        temporary.mkdir()
        handle = os.open(temporary, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network mounts have no locks
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield
        finally:
            os.close(handle)
    finally:
        interrupts.unfinished.discard(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


@functools.lru_cache(maxsize=64)
def _leftovers(folder: Path) -> tuple[Path, ...]:
    """The temporary folders in a folder as this process first saw it: to list it for each of many files takes long."""
    return tuple(folder.glob(_TEMPORARY))


def _remove_leftovers(path: Path) -> None:
    """Deletes what killed writers of this file or folder left beside it, and no folder of a writer at work."""
    for leftover in _leftovers(path.parent.absolute()):
        if leftover.name.rpartition(".tmp-")[0] != f".{path.name}":
            continue
        with contextlib.suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(handle)


def check_place(path: PathLike) -> None:
    """Raises DitError: no file can be written there. To be asked before long work whose result would be lost."""
    path = Path(path)
    with explain_os_errors("write", path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "")
        with _unfinished(_temporary_of(path)):
            pass


def _temporary_of(path: Path) -> Path:
    """A temporary folder for the file, in a folder that is there. Raises DitError: see `atomic_file`."""
    # A rename would put a file in the place of /dev/null, or of /dev/stdout, which is a link.
    if path.absolute().parent == Path("/dev") or not (
        path.is_file() or path.is_dir() or not path.exists()
    ):
        raise DitError(f"'{path}' is no regular file: give the name of a file, or leave it out")
    make_dir(path.parent)
    return _temporary_sibling(path)


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path to write to; on success it replaces `path` in one step.

    If the body raises, `path` keeps its old content and the temporary file is removed.
    Raises DitError: the file system refuses (permissions, disk full), or `path` is a device or a pipe.
    """
    path = Path(path)
    # In a folder, because some writers (safetensors) make temporary files of their own.
    temporary = _temporary_of(path)
    with explain_os_errors("write", path), _unfinished(temporary):
        yield temporary / path.name
        _fsync(temporary / path.name)
        os.replace(temporary / path.name, path)
        _fsync(path.parent)  # makes the rename itself durable
        _remove_leftovers(path)


@contextlib.contextmanager
def atomic_dir(path: PathLike, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary folder to fill; on success it is renamed to `path`.

    Args:
        path: the folder to publish.
        replace: whether to replace an existing folder, which is moved aside first and deleted last.

    Raises:
        DitError: `path` exists and replace is False, or the file system refuses.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise DitError(f"'{path}' exists already: delete it or choose another folder")
    make_dir(path.parent)
    temporary = _temporary_sibling(path)
    retired = _temporary_sibling(path)
    with explain_os_errors("write", path), _unfinished(temporary):
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _fsync(file)
            _fsync(temporary)
            interrupts.unfinished.discard(temporary)  # from here on it is the only copy
            if replace and path.exists():
                os.rename(path, retired)
            os.rename(temporary, path)
            _fsync(path.parent)
            _remove_leftovers(path)
        finally:
            if path.exists():
                shutil.rmtree(retired, ignore_errors=True)
            elif retired.exists():  # the last rename failed: put the old folder back
                os.rename(retired, path)


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A folder that ends with its context or with the process, also by Ctrl-C. Raises DitError: there is no room."""

    def __init__(self, prefix: str):
        try:
            super().__init__(prefix=prefix)
        except OSError as error:
            raise DitError(
                f"cannot make a temporary folder ({error.strerror}): free some space there, or name another place with "
                "TMPDIR"
            ) from None
        interrupts.unfinished.add(Path(self.name))

    def cleanup(self) -> None:
        super().cleanup()
        interrupts.unfinished.discard(Path(self.name))


def write_bytes(path: PathLike, data: bytes) -> None:
    """Writes a file atomically. Raises DitError when the file system refuses."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically, lone surrogates escaped. Raises DitError when the file system refuses."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


# ------------------------------------------------------------------ JSON


def _json_default(value: Any) -> Any:
    """Paths, and numbers and arrays of numpy and jax, as plain JSON values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def write_json(path: PathLike, value: Any) -> None:
    """Writes JSON atomically. Raises DitError: the file system refuses; TypeError: the value has no JSON form."""
    write_text(path, json_text(value, _json_default, indent=1) + "\n")


def read_text(path: PathLike, remedy: str) -> str:
    """The text of an artifact's file or a user's. Raises DitError: it is missing, unreadable, a pipe or not text."""
    try:
        text = decode(read_bytes(Path(path)))
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        raise DitError(f"'{path}' is missing: {remedy}") from None
    except UnicodeDecodeError:
        raise DitError(f"'{path}' is not a text file: {_mended(remedy)}") from None
    except OSError as error:
        raise DitError(f"cannot read '{path}': {error.strerror}") from error


def read_json(path: PathLike, remedy: str = "run the stage that writes it") -> Any:
    """Reads JSON. Raises DitError: the file is missing, unreadable, truncated or not JSON.

    Args:
        remedy: what the user can do about that, as an imperative.
    """
    text = read_text(path, remedy)
    try:
        return parse_json(text, finite=False)  # a limit in a config may be infinite
    except BadJson as error:
        said = "is truncated or not JSON" if "valid" in str(error) else error
        raise DitError(f"'{path}' {said}: {_mended(remedy)}") from None


def _mended(remedy: str) -> str:
    """What helps against a damaged file: a stage writes its own again, users keep theirs."""
    return f"delete it and {remedy}" if remedy.startswith("run") else remedy


def digest_file(path: PathLike) -> str:
    """sha256 of a file's content, in hex. Raises DitError when it cannot be read."""
    with explain_os_errors("read", path), open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# ------------------------------------------------------------------ manifests


def package_versions() -> dict[str, str]:
    """Versions of Python, dit_jax and the packages that its numbers depend on."""
    versions = {"python": platform.python_version(), "dit_jax": dit_jax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def now() -> str:
    """The time in UTC, ISO 8601 with seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_manifest(folder: PathLike, kind: str, *, version: int = 1, **fields: Any) -> None:
    """Writes `manifest.json` of an artifact: its kind, versions, and size and sha256 of every file.

    Args:
        folder: the complete artifact; every file in it is listed.
        kind: format name, for example 'dit_jax.diff_store'.
        version: format version; readers refuse others.
        **fields: further facts about the artifact (config, base digest, …), JSON values.
    """
    folder = Path(folder)
    for leftover in list(folder.rglob(_TEMPORARY)):
        # A killed writer's, which belongs to no artifact.
        shutil.rmtree(leftover, ignore_errors=True)
    files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST:
            files[name] = {"bytes": file.stat().st_size, "sha256": digest_file(file)}
    header = {"format": kind, "version": version, "created": now(), "packages": package_versions()}
    if clash := {"files", *header} & set(fields):
        raise ValueError(f"manifest fields {sorted(clash)} are reserved")
    write_json(folder / MANIFEST, {**header, **fields, "files": files})


def read_manifest(
    folder: PathLike,
    kind: str,
    *,
    version: int = 1,
    check_digests: bool = True,
    remedy: str = "run the stage that writes it",
    file_remedy: str | None = None,
) -> dict[str, Any]:
    """Reads `manifest.json` and checks that the artifact is complete and of the expected format.

    Args:
        folder: the artifact.
        kind: expected format name.
        version: expected format version.
        check_digests: whether to compare the content of the files, not only their sizes.
        remedy: what the user can do if something is missing or broken, as an imperative.
        file_remedy: the same for a single file; default: delete the folder, then `remedy`.

    Raises:
        DitError: the manifest is missing or broken, or has another format or version; a listed file is missing,
            truncated, changed or outside the folder.
    """
    folder = Path(folder)
    for path in (folder, folder / MANIFEST):
        if not path.exists():
            raise DitError(f"'{path}' is missing: {remedy}")
    manifest = _read_listing(folder, f"delete '{folder}' and {remedy}", remedy)
    if manifest.get("format") != kind:
        raise DitError(f"'{folder}' holds {manifest.get('format')!r}, not {kind!r}: check the path")
    if manifest.get("version") != version:
        raise DitError(
            f"'{folder}' has format version {manifest.get('version')!r}, this program reads "
            f"{version}: delete it and {remedy}"
        )
    for name, facts in manifest["files"].items():
        outside = Path(name).is_absolute() or ".." in Path(name).parts
        if outside or len(name.encode(errors="replace")) > MAX_NAME:
            raise DitError(f"'{folder / MANIFEST}' lists {name!r}: do not trust this artifact")
        repair = file_remedy or f"delete '{folder}' and {remedy}"
        check_file(folder / name, facts, repair, check_digests)
    return manifest


def check_file(
    file: PathLike, facts: Mapping[str, Any], remedy: str, check_digest: bool = True
) -> None:
    """Compares a file with its entry in a manifest. Raises DitError: it is missing, or has another size or content."""
    file = Path(file)
    if not file.is_file():
        raise DitError(f"'{file}' is missing: {remedy}")
    if file.stat().st_size != facts.get("bytes"):
        raise DitError(
            f"'{file}' has {file.stat().st_size} bytes instead of {facts.get('bytes')}: {remedy}"
        )
    if check_digest and digest_file(file) != facts.get("sha256"):
        raise DitError(f"'{file}' is damaged (sha256): {remedy}")


def _read_listing(folder: Path, repair: str, remedy: str) -> dict[str, Any]:
    """The content of a manifest that lists files. Raises DitError: it is missing or broken."""
    if (folder / MANIFEST).exists():
        regular_file(folder / MANIFEST)  # the folder may be a stranger's, and a pipe waits forever
    manifest: dict[str, Any] = read_json(folder / MANIFEST, remedy)
    if not fits(manifest, {"files": each({})}):
        raise DitError(f"'{folder / MANIFEST}' is not a manifest: {repair}")
    return manifest


def missing_file(folder: PathLike) -> str | None:
    """The first file of an artifact that is not there (its manifest, or what that lists), or None; reads no content.

    Raises DitError: the manifest is broken, or a file has another size than it says.
    """
    folder, remedy = Path(folder), "run the same command again"
    if not (folder / MANIFEST).exists():
        return MANIFEST
    for name, facts in _read_listing(folder, f"delete it and {remedy}", remedy)["files"].items():
        if not (folder / name).exists():
            return name
        check_file(folder / name, facts, f"delete this file and {remedy}", check_digest=False)
    return None


def content_digest(folder: PathLike) -> str | None:
    """The digest of an artifact's values if its manifest has one, else of its files; None without a sound manifest."""
    try:
        manifest = _read_listing(Path(folder), "", "")
    except DitError:  # whatever reads the artifact reports it
        return None
    if manifest.get("digest"):
        return str(manifest["digest"])
    files = sorted((name, facts.get("sha256")) for name, facts in manifest["files"].items())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
