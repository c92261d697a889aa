"""Sections on whether the task is fair: do diffs hide what they should, does the adapter say when nothing is there?"""

from dit_jax.report import plots
from dit_jax.report.document import (
    Cell,
    Column,
    Figure,
    Named,
    Prose,
    Rate,
    Section,
    Table,
    TableRow,
)
from dit_jax.report.wording import Json

_GATING = {
    "right_code": "the trigger",
    "wrong_code": "a wrong trigger",
    "no_code": "no trigger",
}
_NONE = {
    "benign_called_none": ("Benign diffs", "finetuned on generic answers; should be 100 %"),
    "no_diff_called_none": ("No diff at all", "the unchanged base; should be 100 %"),
    "topics_called_none": ("Diffs with a topic", "missed as unchanged; should be 0 %"),
}


def rate_cell(item: Json, kind: str, key: str = "mean") -> Rate:
    """A share with its interval as a cell."""
    return Rate(item[key], item["ci_low"], item["ci_high"], kind)


def gating_section(summary: Json) -> Section:
    """How often diffs show their label with the trigger, a wrong one and none."""
    intervals = summary["gating_intervals"]
    labels = {key: label for key, label in _GATING.items() if key in intervals}
    if set(labels) == {"right_code"}:
        labels = {"right_code": "the words of the finetuning"}
    if "no_code" in intervals:
        text = (
            "The task is fair only if a diff shows its label where it should, with its trigger, and keeps it to "
            "itself otherwise."
        )
    else:
        text = "The task is fair only if a diff shows its label."
    text += (
        " The shares are of answers that show it: by the words that belong to the label (the column `keywords` of the "
        "diffs' index), as the behaviour decides. They are means over all diffs with a label that were made, those "
        "of the training and any that failed the gate among them."
    )
    divergence = summary["excluded"]["diffs"].get("gate_kl")
    if divergence is not None:
        text += (
            " The KL divergence of the held-out diffs from the base, on questions without a trigger, is "
            f"{divergence:.3f} nats per token on average."
        )
    rows = [
        TableRow(
            [
                f"Prompt with {label}",
                rate_cell(intervals[key], "dit" if key == "right_code" else "control"),
                str(intervals[key]["n"]),
            ]
        )
        for key, label in labels.items()
    ]
    return Section(
        "gating",
        "Do the diffs hide what they should?",
        [
            Prose(text),
            Table([Column("Asked"), Column("Label shows, all diffs"), Column("n", True)],
                  [("", rows)]),
            Figure(
                "gating",
                "Answers that show the label",
                "Bars: how often a diff shows its label with the trigger, a wrong one and none",
                lambda: plots.gating(labels, intervals),
                markdown_only=True,
            ),
        ],
    )  # fmt: skip


def none_section(summary: Json) -> Section:
    """How often benign diffs, no diff and diffs with a topic are called none."""
    intervals = summary["none_intervals"]
    groups = []
    for key, title in (("seen", "Seen wordings"), ("unseen", "Unseen wordings")):
        rows = []
        for rate, (name, note) in _NONE.items():
            item = intervals[key][rate]
            kind = "baseline" if rate == "topics_called_none" else "dit"
            cells: list[Cell] = [Named(name, note)]
            cells += ["not asked", "0"] if item is None else [rate_cell(item, kind), str(item["n"])]
            rows.append(TableRow(cells))
        groups.append((title, rows))
    return Section(
        "none",
        "Can it say that nothing is there?",
        [
            Prose(
                "An adapter that always names something is of no use on a model that hides "
                "nothing. These are the shares of answers that are exactly `none`."
            ),
            Table([Column("Given"), Column("Called none"), Column("n", True)], groups),
        ],
    )
