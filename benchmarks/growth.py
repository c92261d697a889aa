"""How time and memory grow with the number of diffs finetuned at once, and with the number of tokens.

    python -m benchmarks.growth --model tiny
    python -m benchmarks.growth --model qwen3-4b --remat full --sizes 4 8 16 32 --lengths 64 128 256 512

Each point runs in its own process. A second curve finetunes the same diffs in batches of one size, as a run does.
Writes OUT/growth.jsonl, and OUT/growth.png with the fitted slopes.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

from benchmarks import report, run

SIZES = (16, 32, 64, 128, 256, 512)
LENGTHS = (16, 32, 64, 128, 256)


def measure(flags: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    """Rows of `benchmarks.run` with `axis`: "diffs" (all at once), "batches" (of one size) or "tokens"."""
    base = run.make_workload(flags)
    points = [("diffs", dataclasses.replace(base, diffs=size, batch=size)) for size in flags.sizes]
    points += [
        ("batches", dataclasses.replace(base, diffs=size, batch=flags.batch_of))
        for size in flags.sizes
        if size > flags.batch_of
    ]
    points += [("tokens", dataclasses.replace(base, length=length)) for length in flags.lengths]
    rows = []
    for axis, work in points:
        (row,) = run.run_suite(work, [], [], flags.out, flags.timeout, command)
        if "error" in row:
            continue
        rows.append({"axis": axis, **row})
        with open(flags.out / "growth.jsonl", "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def fit(y: list[float], *terms: list[float]) -> tuple[float, ...]:
    """Intercept and the factor of each term, by least squares of the relative errors."""
    scale = np.asarray(y)
    columns = np.stack([np.ones(len(y)), *map(np.asarray, terms)], axis=1)
    found, *_ = np.linalg.lstsq(columns / scale[:, None], np.ones(len(y)), rcond=None)
    return tuple(float(factor) for factor in found)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> list[str]:
    """Draws three panels; returns their findings as sentences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    at_once, batches, by_tokens = (
        [row for row in rows if row["axis"] == axis] for axis in ("diffs", "batches", "tokens")
    )
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)

    sizes = [row["workload"]["diffs"] for row in at_once]
    said = [_per_token(axes[0], at_once, "at once")]
    if batches:
        said[0] += "; " + _per_token(
            axes[0], batches, f"in batches of {batches[0]['workload']['batch']}"
        )
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(sizes, [str(size) for size in sizes])
    axes[0].margins(y=0.3)  # a share of the range of the points, which is far from 0
    axes[0].set(xlabel="diffs", ylabel="µs per token", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)

    held = [report.memory(row) / 2**20 for row in at_once]
    start, slope = fit(held, sizes)
    axes[1].plot(sizes, held, "o", sizes, [start + slope * x for x in sizes], "-")
    axes[1].set(xlabel="diffs at once", ylabel="peak memory, MiB", ylim=(0, None))
    said.append(f"peak memory {start:.0f} MiB + {slope:.2f} MiB per diff")

    tokens = [row["floor"]["tokens"] for row in by_tokens]
    lengths = [row["workload"]["length"] for row in by_tokens]
    seconds = [row["seconds"] for row in by_tokens]
    # Attention compares every position with every other.
    pairs = [count * length for count, length in zip(tokens, lengths, strict=True)]
    start, each, pair = fit(seconds, tokens, pairs)
    fitted = [start + each * x + pair * y for x, y in zip(tokens, pairs, strict=True)]
    axes[2].plot(tokens, seconds, "o", tokens, fitted, "-")
    axes[2].set(xlabel="tokens", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    said.append(
        f"time {start:.2g} s + (length x {pair * 1e6:.2g} µs + {each * 1e6:.3g} µs) per token"
    )
    for axis, text in zip(axes, said, strict=True):
        axis.set_title(text.replace("; ", "\n"), fontsize=8)
    figure.savefig(path, dpi=120)
    return said


def _per_token(axis: Any, rows: list[dict[str, Any]], name: str) -> str:
    """Draws time per token (diffs differ in length) against the number of diffs; returns its range as a sentence."""
    sizes = [row["workload"]["diffs"] for row in rows]
    each = [row["seconds"] / row["floor"]["tokens"] * 1e6 for row in rows]
    axis.plot(sizes, each, "o-", label=name)
    return f"{min(each):.3g} to {max(each):.3g} µs per token for {sizes[0]} to {sizes[-1]} diffs {name}"


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    own = argparse.ArgumentParser(prog="python -m benchmarks.growth", add_help=False)
    own.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    own.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    own.add_argument("--batch-of", type=int, default=64, help="diffs at once of the second curve")
    points, rest = own.parse_known_args(arguments)
    flags = run.parse(["--suite", "diffs", "--out", "runs/growth", *rest])
    if flags.steps is None:
        flags.steps = 4
    vars(flags).update(vars(points))
    rows = measure(flags, f"python -m benchmarks.growth {' '.join(arguments)}".strip())
    for text in plot(rows, flags.out / "growth.png"):
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
