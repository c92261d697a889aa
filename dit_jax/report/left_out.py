"""What no number of the report holds, and why: held-out diffs, answers and grades."""

from collections.abc import Callable

from dit_jax.report.document import Block, Column, Prose, Quote, Section, Table, TableRow
from dit_jax.report.grading import method_name
from dit_jax.report.wording import Json, plural

# Limits of the gate, and whether a value of one is beyond all that can be measured.
_NO_LIMIT: dict[str, Callable[[float], bool]] = {
    "min_right": lambda share: share <= 0,
    "max_wrong": lambda share: share >= 1,
    "max_none": lambda share: share >= 1,
    "max_kl": lambda nats: nats >= 100,  # a token of one in e^100: no answer of a language model
}


def left_out_section(summary: Json) -> Section:
    """Counts of everything that was left out.

    Args:
      summary: with `excluded` and `grades`.
    """
    diffs, rows = summary["excluded"]["diffs"], []
    for method, reasons in summary["excluded"]["answers"].items():
        rows += [
            TableRow(["an answer", method_name(method), Quote(reason), str(count)])
            for reason, count in reasons.items()
        ]
    for grader, entry in summary["grades"].items():
        for method, numbers in entry["methods"].items():
            rows += [
                TableRow([f"a grade by {grader}", method_name(method), Quote(reason), str(count)])
                for reason, count in numbers["excluded"].items()
            ]
    blocks: list[Block] = [Prose(_about_diffs(diffs, summary))]
    if rows:
        columns = [Column("Missing"), Column("Method"), Column("Reason"), Column("Number", True)]
        blocks.append(Table(columns, [("", rows)]))
        blocks.append(
            Prose("What is missing counts nowhere: it is a gap, never a wrong answer or a 1.")
        )
    else:
        blocks.append(
            Prose("Every method answered about every diff, and every answer has its grades.")
        )
    return Section("left-out", "What was left out", blocks)


def _about_diffs(counts: Json, summary: Json) -> str:
    if not counts:
        return "This evaluation did not record which held-out diffs it left out."
    total, failed, out = (counts.get(key) for key in ("held_out", "failed_gate", "excluded"))
    benign = summary["none_intervals"]["seen"]["benign_called_none"] is not None
    text = f"{plural(int(total or 0), 'diff')} were held out{', benign ones among them' if benign else ''}. "
    if failed is None:
        return (
            text
            + "The gate did not decide which of them do what their label says; none was left out."
        )
    limits = summary["config"].get("diffs", {}).get("gate", {})
    within = ", ".join(f"{name} {limits[name]:g}" for name in _NO_LIMIT if name in limits)
    within = f" (`diffs.gate`: {within})" if within else ""
    if not failed and all(
        let_all(limits[name]) for name, let_all in _NO_LIMIT.items() if name in limits
    ):
        return text + (
            f"The limits of the gate{within} let every diff pass, so that passing says nothing: what the diffs do is "
            "measured, but no diff is judged or left out by it."
        )
    text += f"{failed} of them failed the gate, that is, what was measured is beyond its limits{within}. "
    if out:
        return text + f"{out} were left out of all numbers (`evaluate.exclude_failed`)."
    return (
        text
        + "None was left out."
        + (" `evaluate.exclude_failed` leaves out those that fail." if failed else "")
    )
