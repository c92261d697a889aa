"""What the command lines of `audit` and `ask` name: weight diffs in any format, ranges of them, folders and lists."""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dit_jax.api import Diff, Model, deltas_of, load_diffs
from dit_jax.deltas.detect import Found, list_diffs, look, look_for_diffs
from dit_jax.deltas.factors import modules
from dit_jax.deltas.tree import is_lora
from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.formats.files import short, user_path, walk
from dit_jax.models.delta_trees import nbytes
from dit_jax.report.wording import plural
from dit_jax.runtime.artifacts import read_text

_PICKED = re.compile(r"(?P<path>.+)\[(?P<picked>[^\[\]]*)\]")
_PART = re.compile(r"(-?\d{1,18})|(-?\d{1,18})?:(-?\d{1,18})?(?::([1-9]\d{0,17}))?")


@dataclasses.dataclass(frozen=True)
class Target:
    """One weight diff that a user named: `read` gives it, or `problem` says in a line why nothing can.

    name: the path, with the number of the diff where the path holds several; number: that number; place: in the order
    in which reading all diffs of the path costs least; source: the folder or file that is read (a hub id's snapshot),
    and the diff's number in it.
    """

    name: str
    path: str
    number: int = 0
    read: Callable[[], Diff] | None = None
    problem: str = ""
    place: int = 0
    source: tuple[str, int] = ("", 0)

    @functools.cached_property
    def key(self) -> str:
        """Identifies the diff and the state in which its files were first seen, by their sizes and times."""
        path, facts = user_path(self.source[0] or self.path), [self.name, self.problem]
        try:
            for file in sorted(walk(path)) if path.is_dir() else [path]:
                if file.is_file():
                    state = file.stat()
                    facts.append(f"{file}:{state.st_size}:{state.st_mtime_ns}")
        except (DitError, OSError) as problem:  # such as a name that is too long
            facts.append(str(problem))
        return hashlib.sha256("\n".join(facts).encode(errors="backslashreplace")).hexdigest()[:20]


def list_targets(
    given: Sequence[str],
    model: Model,
    split: str | None = None,
    index: int | None = None,
    looked: Mapping[str, Found] | None = None,
    **how: Any,
) -> list[Target]:
    """The diffs of all that a command line names, in its order, each once, however its path is spelled.

    Args:
        given: paths of diffs in any format (`load_diffs`), each also as PATH[3], PATH[256:352] or PATH[0,5,-1]; folders
            of diffs; text files (.txt) with one of these a line.
        split: take only the diffs of this split from files that say it; other files are taken whole.
        index: take only this diff of a path without a range; a negative one counts from the end.
        looked: what `look_at` found, so that large files are not parsed twice.
        **how: `svd_rank` and `align` of `load_diffs`.

    Raises:
        DitError: a range is malformed or holds no diff, there is no diff `index`, two diffs have one name, or nothing
            is left. What cannot be read is a target with its problem.
    """
    found: dict[tuple[str, int], Target] = {}
    names: dict[str, Target] = {}
    for text in given:
        for target in _of(text, model, split, index, looked or {}, how):
            path, number = target.source
            place = os.path.realpath(path) if path else target.path
            if found.setdefault((place, number), target) is not target:
                continue
            if names.setdefault(target.name, target) is not target:  # number 1 of "a", and "a[1]"
                raise DitError(
                    f"two diffs are called {short(target.name)}, one of {short(target.path)} and one of "
                    f"{short(names[target.name].path)}: rename one"
                )
    if not found:
        if split is None:
            raise DitError(f"{', '.join(given)} lists no diff: write one path a line")
        raise DitError(f"no diff of {', '.join(given)} is in the split {split!r}: check --split")
    return list(found.values())


def reading_order(targets: Sequence[Target]) -> list[int]:
    """The numbers of the targets in the order in which reading all of them costs least: path by path."""
    paths: dict[str, int] = {}
    for target in targets:
        paths.setdefault(target.path, len(paths))
    return sorted(range(len(targets)), key=lambda i: (paths[targets[i].path], targets[i].place))


def path_and_range(text: str) -> tuple[str, str | None]:
    """("store", "3:5") for "store[3:5]", unless a file has that name; ("store", None) for "store"."""
    match = None if os.path.exists(os.path.expanduser(text)) else _PICKED.fullmatch(text)
    # What is no number is a mistake in a range only behind a path that is there.
    if match and (
        re.fullmatch(r"[-\d:,\s]+", match["picked"])
        or os.path.exists(os.path.expanduser(match["path"]))
    ):
        return match["path"], match["picked"]
    return text, None


def look_at(given: Sequence[str], one: bool) -> dict[str, Found]:
    """What is at the paths, before a base is loaded.

    Args:
        one: whether a path stands for one diff, so that a folder of several leaves open which.

    Raises:
        DitError: see `look_for_diffs`, or a folder holds several diffs and only one is wanted.
    """
    looked: dict[str, Found] = {}
    for text in given:
        path, picked = path_and_range(text)
        if _is_list(path):
            continue
        looked[path] = found = look_for_diffs(path)
        if found.kind == "folder" and picked is None and one:
            several = len(list_diffs(found.path))
            if several > 1:
                raise DitError(
                    f"'{path}' holds {several} diffs: ask all with --all, choose one with --index, or give its own path"
                )
    return looked


def _is_list(path: str) -> bool:
    return path.endswith(".txt") and os.path.isfile(os.path.expanduser(path))


def _of(
    text: str,
    model: Model,
    split: str | None,
    index: int | None,
    looked: Mapping[str, Found],
    how: Mapping[str, Any],
) -> Iterator[Target]:
    path, picked = path_and_range(text)
    if _is_list(path):
        lines = read_text(user_path(path), "check the list").splitlines()
        for line in filter(None, map(str.strip, lines)):
            if _is_list(path_and_range(line)[0]):
                raise DitError(f"'{path}' names another list, {short(line)}: write its diffs here")
            if not line.startswith("#"):
                yield from _of(line, model, split, index, looked, how)
        return
    for one, part in _parts(path) if picked is None and index is None else [(path, path)]:
        try:
            seen = look(looked.get(path, part) if part == path else part)
            diffs = load_diffs(seen, model, **how)
        except DitError as problem:
            yield Target(one, one, problem=str(problem))
            continue
        places = {number: place for place, number in enumerate(diffs.order)}
        numbers: Sequence[int] = range(len(diffs))
        if picked is not None:
            numbers = _numbers(picked, len(diffs), text)
        elif index is not None:
            numbers = [diffs.number(index)]
        for i in numbers:
            if split is None or diffs.splits[i] in (None, split):
                name = one if len(diffs) == 1 else f"{one}[{i}]"
                read = functools.partial(diffs.__getitem__, i)
                yield Target(name, one, i, read, place=places[i], source=diffs.sources[i])


def _numbers(picked: str, size: int, text: str) -> list[int]:
    """The numbers that "3", "256:352", "0:9:2" or "0,5,-1" picks. Raises DitError: it is malformed or picks none."""
    numbers: list[int] = []
    for part in picked.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise DitError(f"{text!r}: write [3], [256:352] or [0,5,-1] behind the path")
        if match[1] is None:
            low, high, step = (int(end) if end else None for end in match.groups()[1:])
            numbers += range(size)[low:high:step]
        elif -size <= int(match[1]) < size:
            numbers.append(int(match[1]) % size)
        else:
            raise DitError(f"{text!r}: it holds {plural(size, 'diff')}, and no number {match[1]}")
    if not numbers:
        raise DitError(f"{text!r} picks none of {plural(size, 'diff')}: check the range")
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

    LoRAs of a batch are padded to one rank, so that a large one has fewer neighbours (`budgets.padded_bytes`). A diff
    that cannot be read is a batch of its own, with the error. Memory holds one batch.
    """
    waiting: list[tuple[Target, Diff | DitError]] = []
    widest: dict[tuple[str, ...], int] = {}  # bytes of each module
    held = 0
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
        own = {path: nbytes(module) for path, module in modules(diff.delta)}
        wider = {path: max(widest.get(path, 0), own.get(path, 0)) for path in {**widest, **own}}
        held += nbytes(diff.delta)
        padded = (len(waiting) + 1) * sum(wider.values())
        if waiting and padded > budgets.padded_bytes(held):
            yield waiting
            waiting, wider, held = [], own, nbytes(diff.delta)
        waiting.append((target, diff))
        widest = wider
        if len(waiting) == most:
            yield waiting
            waiting, widest, held = [], {}, 0
    if waiting:
        yield waiting
