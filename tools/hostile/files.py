"""Reads many damaged files of each of the `KINDS`, in processes with limits, and counts what came of them.

python -m tools.hostile.files "adapter_config.json" --first 17 --n 1     reads one file again, in this process
"""

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_jax.cli.flags import Parser
from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.runtime.exits import status_of

SECONDS = 30.0  # of one file: the machine may be busy, and a text may take 5 s of CPU time
ADDRESSES = 24 * 2**30  # that a process may map: jax and its libraries take a few GB
MODULE = "tools.hostile.files"
SOUND = {"refused", "read"}


def hostile(
    kinds: list[str], n: int, seed: int = 0, first: int = 0
) -> Iterator[tuple[str, Counter[str], list[str]]]:
    """(kind, outcomes of n files, what was wrong) of each kind.

    Outcomes are "refused" (one clear line), "read" (sound, and as another reader finds it), and what must not be:
    "traceback", "wrong", "executed or opened", "memory", "hang", "crash".
    """
    left, begin = list(kinds), first
    counts, wrong = Counter[str](), list[str]()
    while left:
        for number, outcome, said in _process(left, seed, begin, first, n):
            counts[outcome] += 1
            if outcome not in SOUND:
                wrong.append(f"--seed {seed} --first {number}: {outcome}: {said}")
            begin = number + 1
            if begin == first + n:
                yield left.pop(0), counts, wrong
                counts, wrong, begin = Counter[str](), list[str](), first


def _process(
    kinds: list[str], seed: int, begin: int, first: int, n: int
) -> Iterator[tuple[int, str, str]]:
    """(number, outcome, detail) of the files that one process reads, of the first kind from `begin` on.

    The last one may have ended the process; the caller goes on with the next.
    """
    flags = {"--seed": seed, "--begin": begin, "--first": first, "--n": n}
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, *kinds, *(str(x) for pair in flags.items() for x in pair)],
        stdout=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES)),
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    number, pending, ready, left = begin, b"", False, len(kinds)
    with selectors.DefaultSelector() as output:
        output.register(process.stdout, selectors.EVENT_READ)
        try:
            while heard := output.select(3 * SECONDS if ready else 20 * SECONDS):
                if not (data := process.stdout.read()):
                    break
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    if line == b"ready":
                        ready = True
                        continue
                    outcome, said = json.loads(line)
                    yield number, outcome, said
                    number += 1
                    if number == first + n:
                        number, ready, left = first, False, left - 1
                if not left:
                    return
        finally:
            process.kill()
            code = process.wait()
    if ready:
        yield number, "crash" if heard else "hang", f"status {code}"
    else:
        raise DitError(f"the good files of {kinds} are not all read: python -m {MODULE} KIND")


# ------------------------------------------------------------------ in the process


def _read_files(kind_name: str, seed: int, numbers: range) -> None:
    from tools.hostile.kinds import KINDS

    kind = KINDS[kind_name]
    with tempfile.TemporaryDirectory() as place:
        good, trial = Path(place) / "good", Path(place) / "trial"
        kind.make(good)
        files = sorted(file for file in good.glob(kind.file) if file.is_file())
        _compare(kind, good, kind.read(good))  # imports what both need
        gc.collect()
        gc.freeze()  # or each collection would go through all of jax
        print("ready", flush=True)
        for number in numbers:
            rng = random.Random(f"{kind_name} {seed} {number}")
            shutil.copytree(good, trial)
            file = trial / rng.choice(files).relative_to(good)
            file.write_bytes(kind.damage(file.read_bytes(), rng))
            with contextlib.suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
                kind.seal(trial)  # fails where what lists the files is damaged itself
            print(json.dumps(_outcome(kind, trial, file.stat().st_size)), flush=True)
            shutil.rmtree(trial)


def _outcome(kind: Any, folder: Path, size: int) -> tuple[str, str]:
    from tools.watching import peak, reset_peak, watch

    before, start = reset_peak(), time.monotonic()
    try:
        with watch(folder):
            try:
                found, refusal = kind.read(folder), None
            except DitError as error:
                found, refusal = None, str(error)
    except AssertionError as error:
        return "executed or opened", str(error)[:300]
    except BaseException as error:
        return "traceback", "".join(traceback.format_exception(error)[-3:])[-600:]
    grown, took = peak() - before, time.monotonic() - start
    if grown > budgets.held_bytes(size):
        return "memory", f"{grown >> 20} MB for {size} bytes"
    if took > SECONDS:
        return "hang", f"{took:.1f} s"
    if refusal is not None:
        clear = refusal and "\n" not in refusal and len(refusal) < 1500
        return ("refused", "") if clear else ("traceback", f"no clear line: {refusal[:300]!r}")
    try:
        _compare(kind, folder, found)
    except AssertionError as error:
        return "wrong", str(error)[:300]
    except Exception:
        pass  # the other reader refuses it
    return "read", ""


def _compare(kind: Any, folder: Path, found: Any) -> None:
    """Raises AssertionError unless another reader finds the same, or what that one refuses a file with."""
    try:
        expected = kind.truth(folder)
    except NotImplementedError:
        return
    assert found == expected, f"{str(found)[:120]} is not {str(expected)[:120]}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = Parser(f"python -m {MODULE}", __doc__)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--begin", type=int, help="number of the first file of the first kind")
    return status_of(lambda: _run(parser.parse_args(argv)))


def _run(flags: argparse.Namespace) -> int:
    begin, end = flags.begin, flags.first + flags.n
    for kind in flags.kinds:
        _read_files(kind, flags.seed, range(flags.first if begin is None else begin, end))
        begin = None
    return 0


if __name__ == "__main__":
    sys.exit(main())
