"""Rows of benchmark results as a Markdown table."""

import json
import pathlib
from typing import Any

from benchmarks.floors import Floor

_HEADER = (
    "| contender | seconds (slower than ours) | rate | GFLOP/s (of ceiling) | x floor "
    "| peak memory | warm-up s | check |\n|---|---|---|---|---|---|---|---|"
)


def ceilings(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """The machine's FLOP/s and bytes/s: the best that any contender of a run measured."""
    found = [row["ceilings"] for row in rows if "ceilings" in row]
    names = ("flops_per_second", "bytes_per_second")
    flops, bandwidth = (max((x[name] for x in found), default=float("nan")) for name in names)
    return flops, bandwidth


def numbers(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Derived numbers of a row: rates, share of the ceiling, multiple of its floor."""
    work, seconds = row["workload"], row["seconds"]
    least = Floor(**row["floor"])
    flops, bandwidth = ceilings(rows)
    found = {
        "tokens_per_second": least.tokens / seconds,
        "flops_per_second": least.flops / seconds,
        "share_of_ceiling": least.flops / seconds / flops,
        "floor_seconds": least.seconds(flops, bandwidth),
        "times_floor": seconds / least.seconds(flops, bandwidth),
    }
    if work["suite"] == "diffs":
        found["diffs_per_hour"] = work["diffs"] / seconds * 3600
        found["diff_steps_per_second"] = work["diffs"] * work["steps"] / seconds
    if work["suite"] == "train":
        found["examples_per_second"] = work["batch"] * work["steps"] / seconds
    if work["suite"] in ("ask", "corpus"):
        found["answers_per_second"] = work["diffs"] / seconds
    return found


def memory(row: dict[str, Any]) -> int:
    """Peak bytes of the accelerator if there is one, else of the process."""
    return row.get("peak_device_bytes") or row["peak_host_bytes"]


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """One row of a run's table. Its first row is ours."""
    ours = rows[0]
    valid = "ok" if row["valid"] else "**INVALID**"
    if "error" in row:
        return f"| {row['contender']} | - | - | - | - | - | - | {valid}: {row['check']} |"
    found = numbers(row, rows)
    ratio = f" ({row['seconds'] / ours['seconds']:.2f} x)" if "error" not in ours else ""
    rate = {
        "diffs": "{tokens_per_second:.0f} tokens/s, {diffs_per_hour:.0f} diffs/h",
        "train": "{tokens_per_second:.0f} tokens/s, {examples_per_second:.1f} examples/s",
    }.get(
        row["workload"]["suite"],
        "{tokens_per_second:.0f} tokens/s, {answers_per_second:.1f} answers/s",
    ).format(**found)
    return (
        f"| {row['contender']} | {row['seconds']:.3g}{ratio} | {rate} "
        f"| {found['flops_per_second'] / 1e9:.3g} ({found['share_of_ceiling']:.0%}) "
        f"| {found['times_floor']:.1f} | {memory(row) / 2**30:.2f} GiB "
        f"| {row['warm_up_seconds']:.1f} | {valid}: {row['check']} |"
    )


def title(row: dict[str, Any]) -> str:
    """Suite, model and sizes of a row."""
    work = row["workload"]
    names = {
        "diffs": ("diffs", "batch", "steps", "samples", "length", "scored", "rank"),
        "train": ("batch", "steps", "length", "scored", "rank", "adapter_rank"),
        "ask": ("diffs", "batch", "length", "new_tokens", "rank", "adapter_rank"),
        "corpus": ("diffs", "batch", "length", "new_tokens"),
    }[work["suite"]]
    sizes = ", ".join(f"{name} {work[name]}" for name in names)
    return f"{work['suite']}: {work['model']}, {work['dtype']} ({sizes}, remat {work['remat']})"


def table(rows: list[dict[str, Any]]) -> str:
    """One run of a suite: heading, command, machine, floor, rows. Ours comes first."""
    ours = rows[0]
    least, (flops, bandwidth) = Floor(**ours["floor"]), ceilings(rows)
    loads = ", ".join(format(row["load_average_before"], ".1f") for row in rows)
    versions = ", ".join(
        f"{name} {ours['versions'][name]}"
        for name in ("python", "jax", "torch", "transformers", "peft")
        if name in ours["versions"]
    )
    device = ours.get("facts", {}).get("device", ours["workload"]["platform"])
    return "\n".join(
        [
            f"### {title(ours)}",
            "",
            f"    {ours['command']}",
            "",
            f"{ours['date'][:10]}, {device}, {ours['cores']} cores, {versions}. "
            f"Median of {ours['workload']['repeats']}; load average before: {loads}. "
            f"Ceiling {flops / 1e9:.4g} GFLOP/s (matmul), {bandwidth / 1e9:.3g} GB/s. "
            f"Floor {least.flops / 1e9:.4g} GFLOP (4N a token), {least.bytes / 1e9:.3g} GB: "
            f"{least.seconds(flops, bandwidth):.3g} s.",
            "",
            _HEADER,
            *(line(row, rows) for row in rows),
            "",
        ]
    )


def write(out: pathlib.Path) -> None:
    """Renders OUT/results.jsonl as OUT/results.md."""
    runs: list[list[dict[str, Any]]] = []
    for text in (out / "results.jsonl").read_text().splitlines():
        row = json.loads(text)
        if row["contender"] == "ours":
            runs.append([])
        runs[-1].append(row)
    (out / "results.md").write_text("\n".join(table(rows) for rows in runs))
