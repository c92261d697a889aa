"""Runs whose disk fills or vanishes at a random moment, and which go on when it is mended.

Needs the right to mount: the workdir is on a disk in memory.
"""

import contextlib
import ctypes
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dit_jax.errors import DitError
from dit_jax.runtime.progress import Progress
from tools import small_run

STAGES = "--config.stages=('diffs','train','evaluate')"
METHODS = "--config.evaluate.methods=('dit','base_question','shuffled_diff')"
_PROGRESS = re.compile(r"\w+: \d+/\d+, about")
Ended = tuple[int, str, list[str]]  # the status, the stage that was at work, lines on stderr
_LIBC = ctypes.CDLL(None)
_REMOUNT, _BIND, _DETACH = 32, 4096, 2  # of <sys/mount.h>
FAULTS = ("full", "vanished")


def disk_faults(n: int, seed: int = 0) -> Iterator[tuple[str, Counter[str], list[str]]]:
    """(fault and the stage that it met, outcomes, what was wrong) of n runs with each fault.

    Outcomes are "one line, then equal": the run ended with one line, and the same command ended it bitwise as an
    undisturbed one; "too late, then equal": the run did not meet the fault; "wrong".
    """
    rng = random.Random(seed)
    found: dict[str, tuple[Counter[str], list[str]]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        _run(place / "compiles")
        start = time.monotonic()
        _run(place / "whole")
        seconds, expected = time.monotonic() - start, small_run.results(place / "whole")
        size = sum(file.stat().st_size for file in (place / "whole").rglob("*") if file.is_file())
        with Progress("runs", n * len(FAULTS)) as progress:
            for number in range(n * len(FAULTS)):
                fault, when = FAULTS[number % len(FAULTS)], rng.random()
                with _disk(place / f"disk{number}") as disk:
                    status, stage, said = _faulty(disk, fault, when * seconds, int(when * size))
                    again, _, complaint = _run(disk / "w")
                    equal = again == 0 and small_run.results(disk / "w") == expected
                one_line = (status, len(said)) == (2, 1) and said[0].startswith("error: ")
                outcome = "too late" if status == 0 else "one line" if one_line else ""
                counts, wrong = found.setdefault(f"{fault}, {stage}", (Counter(), []))
                counts[f"{outcome}, then equal" if outcome and equal else "wrong"] += 1
                if not (outcome and equal):
                    wrong.append(
                        f"{number}: status {status}: {said[-6:]}; then {again}: {complaint[-6:]}"
                    )
                progress.advance(1)
    for kind, (counts, wrong) in sorted(found.items()):
        yield kind, counts, wrong


def _faulty(disk: Path, fault: str, seconds: float, room: int) -> Ended:
    """A run on a disk with a fault, which is mended afterwards."""
    if fault == "full":
        _mount(None, disk, None, _REMOUNT, f"size={max(room, 4096)}")
        said = _run(disk / "w")
        _mount(None, disk, None, _REMOUNT, "size=64m")
        return said
    strike = threading.Timer(seconds, _unmount, [disk])
    strike.start()
    said = _run(disk / "w")
    strike.cancel()
    strike.join()
    if not os.path.ismount(disk):
        shutil.rmtree(disk / "w", ignore_errors=True)  # what was written to the empty place
        _mount(f"{disk}.kept", disk, None, _BIND)
    return said


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[Path]:
    """A disk that stays where it is under another name while it vanishes."""
    kept = Path(f"{place}.kept")
    place.mkdir()
    kept.mkdir()
    if not _mount("tmpfs", kept, "tmpfs", 0, "size=64m"):
        raise DitError("faults of disks need the right to mount: run this as root")
    _mount(str(kept), place, None, _BIND)
    try:
        yield place
    finally:
        for path in (place, kept):
            _unmount(path)


def _mount(source: str | None, place: Path, kind: str | None, how: int, options: str = "") -> bool:
    """mount(2), without a process that would have to start first."""
    texts = (x and x.encode() for x in (source, str(place), kind))
    return _LIBC.mount(*texts, ctypes.c_ulong(how), options.encode() or None) == 0


def _unmount(place: Path) -> None:
    _LIBC.umount2(str(place).encode(), _DETACH)


def _run(workdir: Path) -> Ended:
    command = [sys.executable, "-m", "dit_jax.main", *small_run.flags(workdir, STAGES, METHODS)]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
    stages = re.findall(r"^\[(\w+)\]", ended.stdout, re.MULTILINE)
    said = [line for line in ended.stderr.splitlines() if not _PROGRESS.match(line)]
    return ended.returncode, stages[-1] if stages else "start", said
