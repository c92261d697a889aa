"""How time and memory grow: with the number of diffs finetuned at once, and with the number of tokens.

    python -m benchmarks.growth --model tiny
    python -m benchmarks.growth --model qwen3-4b --remat full --sizes 4 8 16 32 --lengths 64 128 256 512

Each point is a process of its own. Writes OUT/growth.jsonl, and OUT/growth.png with the fitted slopes.
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
    """Rows of `benchmarks.run` with `axis`: "diffs" or "tokens"."""
    base = run.make_workload(flags)
    points = [
        ("diffs", dataclasses.replace(base, diffs=size, batch=size)) for size in flags.sizes
    ] + [("tokens", dataclasses.replace(base, length=length)) for length in flags.lengths]
    rows = []
    for axis, work in points:
        (row,) = run.run_suite(work, [], [], flags.out, flags.timeout, command)
        if "error" in row:
            continue
        rows.append({"axis": axis, **row})
        with open(flags.out / "growth.jsonl", "a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def fit(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and intercept of the line that fits best."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> list[str]:
    """Three panels; returns what they say as sentences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_diffs = [row for row in rows if row["axis"] == "diffs"]
    by_tokens = [row for row in rows if row["axis"] == "tokens"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    said = []

    sizes = [row["workload"]["diffs"] for row in by_diffs]
    each = [
        row["seconds"] / row["floor"]["tokens"] * 1e6 for row in by_diffs
    ]  # diffs differ in length
    axes[0].plot(sizes, each, "o-")
    axes[0].set(xscale="log", xlabel="diffs at once", ylabel="µs per token", ylim=(0, None))
    said.append(
        f"time per token {min(each):.3g} to {max(each):.3g} µs from {sizes[0]} to {sizes[-1]} diffs at once"
    )

    held = [report.memory(row) / 2**20 for row in by_diffs]
    slope, start = fit(sizes, held)
    axes[1].plot(sizes, held, "o", sizes, [start + slope * x for x in sizes], "-")
    axes[1].set(xlabel="diffs at once", ylabel="peak memory, MiB", ylim=(0, None))
    said.append(f"peak memory {start:.0f} MiB + {slope:.2f} MiB per diff")

    tokens = [row["floor"]["tokens"] for row in by_tokens]
    seconds = [row["seconds"] for row in by_tokens]
    slope, start = fit(tokens, seconds)
    axes[2].plot(tokens, seconds, "o", tokens, [start + slope * x for x in tokens], "-")
    axes[2].set(xlabel="tokens", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    said.append(f"time {start:.3g} s + {slope * 1e6:.3g} µs per token")
    for axis, text in zip(axes, said, strict=True):
        axis.set_title(text, fontsize=8)
    figure.savefig(path, dpi=120)
    return said


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    own = argparse.ArgumentParser(prog="python -m benchmarks.growth", add_help=False)
    own.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    own.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
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
