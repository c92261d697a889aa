"""What the command lines of `audit` and `ask` name: weight diffs in any format, ranges of them, folders and lists."""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_jax.api import Diff, Model, deltas_of, load_diffs
from dit_jax.deltas.detect import list_diffs, look
from dit_jax.deltas.tree import is_lora
from dit_jax.errors import DitError
from dit_jax.runtime.os_errors import explain_os_errors

_PICKED = re.compile(r"(?P<path>.+)\[(?P<picked>[-\d:,\s]+)\]")
_PART = re.compile(r"(-?\d+)|(-?\d+)?:(-?\d+)?")


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight diff that a user named: `read` gives it, or `problem` says in a line why nothing can.

    name: the path, with the number of the diff where the path holds several; number: that number.
    """

    name: str
    path: str
    number: int = 0
    read: Callable[[], Diff] | None = None
    problem: str = ""

    def key(self) -> str:
        """Identifies the diff and the state of its files, by their sizes and times."""
        path, facts = Path(os.path.expanduser(self.path)), [self.name, self.problem]
        for file in sorted(path.rglob("*") if path.is_dir() else [path]):
            if file.is_file():
                state = file.stat()
                facts.append(f"{file}:{state.st_size}:{state.st_mtime_ns}")
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:20]


def list_targets(
    given: Sequence[str], model: Model, split: str | None = None, svd_rank: int | None = None
) -> list[Target]:
    """The diffs of all that a command line names, in its order, each once.

    Args:
        given: paths of diffs in any format (`load_diffs`), each also as PATH[3], PATH[256:352] or PATH[0,5,-1]; folders
            of diffs; text files (.txt) with one of these a line.
        split: take only the diffs of this split from files that say it; other files are taken whole.

    Raises:
        DitError: a range is malformed or holds no diff, or nothing is left. A diff that cannot be read is a target.
    """
    found: dict[str, Target] = {}
    for text in given:
        for target in _of(text, model, split, svd_rank):
            found.setdefault(target.name, target)
    if not found:
        raise DitError(f"no diff of {', '.join(given)} is in the split {split!r}: check --split")
    return list(found.values())


def _of(text: str, model: Model, split: str | None, svd_rank: int | None) -> Iterator[Target]:
    match = _PICKED.fullmatch(text) if not os.path.exists(os.path.expanduser(text)) else None
    path, picked = (match["path"], match["picked"]) if match else (text, None)
    place = Path(os.path.expanduser(path))
    if place.suffix == ".txt" and place.is_file():
        with explain_os_errors("read", place):
            lines = place.read_text("utf-8", "replace").splitlines()
        for line in lines:
            if line.strip() and not line.startswith("#"):
                yield from _of(line.strip(), model, split, svd_rank)
        return
    for one, part in [(path, path)] if picked else _parts(path):
        try:
            diffs = load_diffs(part, model, svd_rank)
        except DitError as problem:
            yield Target(one, one, problem=str(problem))
            continue
        numbers = range(len(diffs)) if picked is None else _numbers(picked, len(diffs), text)
        for i in numbers:
            if split is None or diffs.splits[i] in (None, split):
                name = one if len(diffs) == 1 else f"{one}[{i}]"
                yield Target(name, one, i, functools.partial(diffs.__getitem__, i))


def _numbers(picked: str, size: int, text: str) -> list[int]:
    """The numbers that "3", "256:352" or "0,5,-1" picks. Raises DitError: it is malformed or picks none."""
    numbers: list[int] = []
    for part in picked.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise DitError(f"{text!r}: write [3], [256:352] or [0,5,-1] behind the path")
        if match[1] is None:
            low, high = (None if end is None else int(end) for end in match.groups()[1:])
            numbers += range(size)[low:high]
        elif -size <= int(match[1]) < size:
            numbers.append(int(match[1]) % size)
        else:
            raise DitError(f"{text!r}: there are {size} diffs, and no number {match[1]}")
    if not numbers:
        raise DitError(f"{text!r} picks none of {size} diffs: check the range")
    return numbers


def _parts(path: str) -> list[tuple[str, Any]]:
    """(name, what `load_diffs` takes) of the path itself, or of each diff in a folder of diffs."""
    try:
        found = look(path)
        if found.kind != "folder":
            return [(path, found)]
        return [(os.path.join(path, name), part) for name, part in list_diffs(found.path)]
    except DitError:
        return [(path, path)]  # `load_diffs` says what is wrong


def in_batches(
    targets: Sequence[Target], model: Model, most: int
) -> Iterator[list[tuple[Target, Diff | DitError]]]:
    """The diffs in batches that share a decode: up to `most` LoRAs of any ranks and modules, or one dense diff.

    A diff that cannot be read is a batch of its own, with the error. Memory holds one batch.
    """
    waiting: list[tuple[Target, Diff | DitError]] = []
    for target in targets:
        try:
            if target.read is None:
                raise DitError(target.problem)
            diff = target.read()
            deltas_of(diff, model.config, target.name)
        except DitError as problem:
            yield [(target, problem)]
            continue
        if not is_lora(diff.delta):
            yield [(target, diff)]
            continue
        waiting.append((target, diff))
        if len(waiting) == most:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
