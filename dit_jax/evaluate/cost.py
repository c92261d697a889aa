"""What a run cost, how its losses went, and the config and versions that it ran with."""

import functools
import json
from typing import Any

from dit_jax.evaluate import plots
from dit_jax.evaluate.document import (
    Block,
    Column,
    Figure,
    Prose,
    Section,
    Settings,
    Share,
    Table,
    TableRow,
)
from dit_jax.evaluate.names import Json, duration
from dit_jax.evaluate.summary import Inputs


def cost_section(summary: Json, inputs: Inputs) -> Section:
    """Seconds of every stage, peak memory and the loss curves."""
    seconds, total = summary["seconds"], summary["seconds_total"]
    rows = [
        TableRow([stage, Share(duration(spent), spent / total if total > 0 else 0.0)])
        for stage, spent in seconds.items()
    ]
    rows.append(TableRow(["All stages", Share(duration(total), 1.0)], strong=True))
    text = "Wall time of every stage, compilation included."
    if memory := summary["peak_memory_bytes"]:
        text += f" Peak memory of the process: {memory / 2**30:.2f} GiB."
    blocks: list[Block] = [Prose(text), Table([Column("Stage"), Column("Time")], [("", rows)])]
    titles = {"diff_loss": "Loss of the diffs", "adapter_loss": "Loss of the adapter"}
    for name, title in titles.items():
        curve = inputs.curves[name]
        if not curve:  # the stage ran elsewhere
            continue
        blocks.append(
            Figure(
                name,
                f"{title} while training",
                f"{title} over optimizer steps, from {curve[0][1]:.3g} to {curve[-1][1]:.3g}",
                functools.partial(plots.curve, curve, "loss"),
            )
        )
    return Section("cost", "Cost and training", blocks)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        items = []
        for key, inner in value.items():
            items += _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return items
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def setup_section(summary: Json) -> Section:
    """Config and versions, one line for every leaf."""
    return Section(
        "setup",
        "Config and versions",
        [
            Prose("The same config, seed and versions give the same answers on the same device."),
            Settings("Config", _flatten(summary["config"])),
            Settings("Versions", _flatten(summary["versions"]), folded=False),
        ],
    )
