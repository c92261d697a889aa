"""Grades on disk: one line of JSON per grade, appended, with a digest that tells a damaged line."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from dit_jax.errors import printable
from dit_jax.formats.files import file_below
from dit_jax.formats.json_parser import parse_json
from dit_jax.runtime.artifacts import make_dir
from dit_jax.runtime.os_errors import explain_os_errors


class Entry(NamedTuple):
    """A grade that was made before."""

    score: float
    raw: str


def entry_key(*parts: Any) -> str:
    """sha256 of everything that a grade depends on; the parts are kept apart."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _parse(line: bytes) -> tuple[str, Entry] | None:
    """The key and grade of a line, or None if it is damaged."""
    with contextlib.suppress(ArithmeticError, ValueError, TypeError, KeyError, AttributeError):
        fields = parse_json(line)
        if fields.pop("seal") != _seal(fields):
            return None
        score = float(fields["score"])
        if math.isfinite(score) and 1 <= score <= 5:
            return str(fields["key"]), Entry(score, str(fields["raw"]))
    return None


class Cache:
    """The grades in a file, which need not exist yet. Several processes may append at once.

    `damaged` lists what is wrong with lines that cannot be trusted ("grades.jsonl, line 3: …"): their
    grades are made again. The newest good line of a key counts.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the file. Raises DitError: it is there and cannot be read, or is a link out of its folder."""
        self.path = Path(path)
        self.damaged: list[str] = []
        self._entries: dict[str, Entry] = {}
        if not os.path.lexists(self.path):
            return
        with explain_os_errors("read", self.path):
            lines = file_below(self.path.parent, self.path).read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            parsed = _parse(line)
            if parsed is None:
                start = printable(line[:40].decode("utf-8", "replace"))
                self.damaged.append(f"{self.path}, line {number}: damaged, graded again: {start!r}")
            else:
                self._entries[parsed[0]] = parsed[1]

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        """The grade of a key, or None."""
        return self._entries.get(key)

    def put(self, key: str, score: float, raw: str, grader: str) -> None:
        """Appends a grade in one write under a lock. Raises DitError when the file system refuses."""
        fields = {"key": key, "score": score, "raw": raw, "grader": grader}
        line = json.dumps({**fields, "seal": _seal(fields)}).encode() + b"\n"
        make_dir(self.path.parent)
        with explain_os_errors("write", self.path), open(self.path, "ab+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # A writer that was killed may have left half a line: what follows starts its own.
            if handle.seek(0, os.SEEK_END):
                handle.seek(-1, os.SEEK_END)
                if handle.read(1) != b"\n":
                    line = b"\n" + line
            handle.write(line)
            handle.flush()
            os.fsync(handle.fileno())
        self._entries[key] = Entry(score, raw)
