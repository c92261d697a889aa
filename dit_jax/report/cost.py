"""What a run cost, how its losses went, and the config and versions that it ran with."""

import functools
import json
from typing import Any

from dit_jax.evaluate.methods import METHODS
from dit_jax.report import plots
from dit_jax.report.document import (
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
from dit_jax.report.grading import as_code
from dit_jax.report.summary import Inputs
from dit_jax.report.wording import Json, duration, number, shown_name, size


def cost_section(summary: Json, inputs: Inputs) -> Section:
    """Seconds of every stage, peak memory and the loss curves."""
    seconds, total = summary["seconds"], summary["seconds_total"]
    rows = [
        TableRow([stage, Share(duration(spent), spent / total if total > 0 else 0.0)])
        for stage, spent in seconds.items()
    ]
    rows.append(TableRow(["All stages", Share(duration(total), 1.0)], strong=True))
    text = "Wall time of every stage, compilation included."
    if source := inputs.stages.get("diffs", {}).get("shared_from"):
        text += f" The diffs were taken over from the run {as_code(str(source))}: their time is what they took there."
    if device := summary["cost"].get("device"):
        text += f" Evaluated on {device['count']} × {as_code(device['kind'])}."
    if memory := summary["peak_memory_bytes"]:
        text += f" Peak memory of the process: {memory / 2**30:.2f} GiB."
    blocks: list[Block] = [Prose(text), Table([Column("Stage"), Column("Time")], [("", rows)])]
    blocks += _answers(summary) + _sizes(summary["cost"])
    titles = {
        "diff_loss": "Loss of the diffs (mean over them)",
        "adapter_loss": "Loss of the adapter",
    }
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


def _answers(summary: Json) -> list[Block]:
    """What each method cost."""
    methods = summary["cost"].get("methods", {})
    rows = [
        TableRow(
            [
                shown_name(name) if name in METHODS else name.replace("_", " "),
                duration(entry["seconds"]),
                # What reads weights or logits answers nothing, and what it reads is not counted.
                *(
                    number(entry[key]) if entry["answers"] else "–"
                    for key in ("answers", "prompt_tokens", "tokens")
                ),
            ]
        )
        for name, entry in methods.items()
    ]
    titles = ("Time", "Answers", "Tokens read", "Tokens written")
    columns = [Column("Method"), *(Column(title, True) for title in titles)]
    text = (
        "What each method cost. The first to run compiles what the others use; a guesser's tokens and the answers "
        "of the base that it needs are in its method's. DIT's answers are those to all wordings, also without a diff"
    )
    benign = summary["none_intervals"]["seen"]["benign_called_none"] is not None
    text += " and about benign diffs." if benign else "."
    return [Prose(text), Table(columns, [("", rows)])] if rows else []


def _sizes(cost: Json) -> list[Block]:
    sizes, parameters = cost.get("bytes", {}), cost.get("parameters", {})
    titles = {
        "base": "Base model",
        "adapter": "Adapter",
        "diff": "One diff",
        "all_diffs": "All diffs on disk",
    }
    rows = [
        TableRow([title, number(parameters[name]) if name in parameters else "", size(sizes[name])])
        for name, title in titles.items()
        if name in sizes
    ]
    columns = [Column("Size of"), Column("Parameters", True), Column("Bytes", True)]
    return [Table(columns, [("", rows)])] if rows else []


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
