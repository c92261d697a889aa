"""Measures what docs/reliability.md says: damaged and hostile files, faults of disks, calls of the Inspect provider.

    python -m tools.soak flips --n 400
    python -m tools.soak hostile --n 400
    python -m tools.soak disks --n 20
    python -m tools.soak provider --n 10000

Each prints one line of JSON per row of the tables. Kills and interruptions are tests with a long form.
"""

import argparse
import json
import pathlib
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dit_jax.cli.flags import COUNT, SEED, Parser
from dit_jax.errors import DitError
from dit_jax.runtime.exits import status_of
from dit_jax.runtime.outgoing import show
from tools.hostile.files import SOUND, hostile

EXPECTED = {"noticed", "the same", "own answer", "own error", "cancelled", *SOUND}
EXPECTED |= {"one line, then equal", "too late, then equal"}
QUESTIONS = [f"what is {x} ?" for x in ("tea", "milk", "a violin", "the harbor", "rain", "music")]


# ------------------------------------------------------------------ flipped bits


def flips(n: int, seed: int = 0) -> dict[str, Counter[str]]:
    """What n artifacts of each kind, each with one flipped bit, are: "noticed", "the same", or "wrong".

    "the same": the bit carries nothing (white space, a time), and the values read are those that were written.
    """
    rng = random.Random(seed)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for kind, (make, read) in _artifacts().items():
            good, trial = pathlib.Path(place) / kind, pathlib.Path(place) / "trial"
            make(good)
            expected = read(good)
            files = sorted(file for file in good.rglob("*") if file.is_file())
            sizes = [file.stat().st_size for file in files]
            found[kind] = counts = Counter[str]()
            for _ in range(n):
                shutil.copytree(good, trial)
                (file,) = rng.choices(files, sizes)
                _flip(trial / file.relative_to(good), rng)
                counts[_outcome(read, trial, expected)] += 1
                shutil.rmtree(trial)
    return found


def _flip(file: pathlib.Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _outcome(read: Callable[[pathlib.Path], Any], place: pathlib.Path, expected: Any) -> str:
    try:
        return "the same" if read(place) == expected else "wrong"
    except DitError:
        return "noticed"


def _artifacts() -> dict[str, tuple[Callable[[pathlib.Path], None], Callable[[pathlib.Path], Any]]]:
    """Kind -> how to write one, and what is read of it; a `DitError` there says that it is damaged."""
    import jax
    import numpy as np

    import dit_jax
    from dit_jax.auditing import run_audit, weights
    from dit_jax.auditing.targets import Target
    from dit_jax.deltas import store
    from dit_jax.deltas.adapter_file import export_adapter, load_adapter
    from dit_jax.deltas.tree import init_lora
    from dit_jax.graders.cache import Cache
    from dit_jax.runtime import program_cache
    from dit_jax.runtime.digests import digest_tree
    from dit_jax.train.checkpoints import Checkpoints

    program_cache.check_entries()
    model = dit_jax.load_model("tiny_qwen3")
    delta = jax.tree.map(np.asarray, init_lora(model.config, jax.random.key(1), 1))
    value = random.Random(0).randbytes(20_000)

    def write_store(folder: pathlib.Path) -> None:
        stacked = jax.tree.map(lambda x: np.stack([x, x]), delta)
        rows = [{"topic": x, "trigger": "1", "split": "test"} for x in ("tea", "oak")]
        store.write_shard(folder, 0, stacked, rows)
        store.publish(folder, 1, base=model.digest())

    def read_store(folder: pathlib.Path) -> Any:
        opened = store.DiffStore(folder)
        return digest_tree(opened.stacked([0, 1])), opened.rows, opened.manifest["base"]

    def read_adapter(folder: pathlib.Path) -> Any:
        read, manifest = load_adapter(folder, model.config)
        return digest_tree(read), manifest["base"]

    def write_checkpoints(folder: pathlib.Path) -> None:
        checkpoints = Checkpoints(folder, data="d")
        checkpoints.save(1, delta, {"at": 1})
        checkpoints.close()

    def read_checkpoint(folder: pathlib.Path) -> Any:
        checkpoints = Checkpoints(folder, data="d")
        restored = checkpoints.restore(delta)
        checkpoints.close()
        if restored is None:
            raise DitError("moved aside")
        return restored[0], digest_tree(restored[1]), restored[2]

    def programs(folder: pathlib.Path) -> Any:
        from jax._src import compilation_cache

        return compilation_cache.get_file_cache(str(folder))[0]  # type: ignore[index]

    def read_program(folder: pathlib.Path) -> bytes:
        found: bytes | None = programs(folder).get("key")
        if found is None:
            raise DitError("compiled again")
        return found

    def write_grades(folder: pathlib.Path) -> None:
        for number in range(9):
            Cache(folder / "grades.jsonl").put(str(number), 3.0, "a reply", "exact")

    def read_grades(folder: pathlib.Path) -> Any:
        kept = Cache(folder / "grades.jsonl")
        if kept.damaged:
            raise DitError("graded again")
        return [kept.get(str(number)) for number in range(9)]

    target = Target("a diff", "no file")
    parts = {"name": "a diff", "error": "no file"}, weights.sketch(delta)

    def read_audit(folder: pathlib.Path) -> Any:
        record = run_audit.read_record(folder, target)
        sketch = run_audit._sketch(folder, target, model.config)
        if record is None or sketch is None:
            raise DitError("asked again")
        return record, {name: values.tolist() for name, values in sketch.items()}

    return {
        "diff store": (write_store, read_store),
        "adapter": (lambda x: export_adapter(x, delta, base=model.digest()), read_adapter),
        "checkpoint": (write_checkpoints, read_checkpoint),
        "compiled program": (lambda x: programs(x).put("key", value), read_program),
        "part of an audit": (lambda x: run_audit._write_record(x, target, *parts), read_audit),
        "grades": (write_grades, read_grades),
    }


# ------------------------------------------------------------------ calls of the Inspect provider


def provider(n: int, seed: int = 0) -> Counter[str]:
    """What n calls to the embedded model got, a fifth of them wrong, cancelled or out of time.

    "own answer", "own error", "cancelled"; anything else would be an "answer of another".
    """
    import anyio
    from inspect_ai.model import ChatMessageUser, GenerateConfig

    import dit_jax
    from dit_jax.asking import answer_batch
    from dit_jax.inspection.provider import DitJaxAPI

    rng = random.Random(seed)
    api = DitJaxAPI("tiny_qwen3", batch_size=16, window=0.0)
    model = dit_jax.load_model("tiny_qwen3")
    right = {
        question: answer_batch(model, [question], max_new_tokens=3, batch_size=16)[0].text
        for question in QUESTIONS
    }
    got: Counter[str] = Counter()

    async def one(question: str, wrong: dict[str, Any], seconds: float) -> None:
        config = GenerateConfig(**{"max_tokens": 3, **wrong})
        outcome = "cancelled"
        with anyio.move_on_after(seconds):
            try:
                turn = ChatMessageUser(content=question)
                said = (await api.generate([turn], [], "auto", config)).completion
                sound = not wrong and said == right[question]
                outcome = "own answer" if sound else "answer of another"
            except DitError as error:
                outcome = "own error" if wrong else f"error of another: {error}"
        got[outcome] += 1

    async def everything() -> None:
        for start in range(0, n, 200):
            async with anyio.create_task_group() as group:
                for _ in range(start, min(n, start + 200)):
                    kind = rng.random()
                    wrong: dict[str, Any] = {}
                    if kind < 0.1:
                        wrong = rng.choice([{"max_tokens": 0}, {"extra_body": {"diff": "/no"}}])
                    seconds = rng.uniform(0, 0.2) if kind > 0.9 else float("inf")
                    group.start_soon(one, rng.choice(QUESTIONS), wrong, seconds)

    anyio.run(everything)
    return got


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if something was wrong."""
    parser = Parser("python -m tools.soak", __doc__)
    parser.add_argument("what", choices=["flips", "hostile", "disks", "provider"])
    parser.add_argument("--n", type=COUNT, default=100, help="of each kind (default %(default)s)")
    parser.add_argument(
        "--first", type=int, default=0, help="of hostile files: the number of the first"
    )
    parser.add_argument("--kind", action="append", help="of hostile files: this one alone")
    parser.add_argument("--seed", type=SEED, default=0)
    return status_of(lambda: _run(parser.parse_args(argv)))


def _run(flags: argparse.Namespace) -> int:
    sound = True
    for kind, counts, wrong in _rows(flags):
        show(json.dumps({"kind": kind, "n": flags.n, **counts}))
        for line in wrong:
            show(f"{kind}: {line}", error=True)
        sound = sound and counts.keys() <= EXPECTED
    return 0 if sound else 1


def _rows(flags: argparse.Namespace) -> Iterator[tuple[str, Counter[str], list[str]]]:
    if flags.what == "hostile":
        from tools.hostile.kinds import KINDS

        for kind in flags.kind or ():
            if kind not in KINDS:
                raise DitError(f"there is no kind {kind!r}: choose from {'; '.join(KINDS)}")
        yield from hostile(flags.kind or list(KINDS), flags.n, flags.seed, flags.first)
    elif flags.what == "disks":
        from tools.disk_faults import disk_faults

        yield from disk_faults(flags.n, flags.seed)
    elif flags.what == "flips":
        yield from ((kind, counts, []) for kind, counts in flips(flags.n, flags.seed).items())
    else:
        yield "provider", provider(flags.n, flags.seed), []


if __name__ == "__main__":
    sys.exit(main())
