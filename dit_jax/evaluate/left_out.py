"""What no number of the report holds, and why: held-out diffs, answers and grades."""

from dit_jax.evaluate.document import Block, Column, Prose, Quote, Section, Table, TableRow
from dit_jax.evaluate.grading import method_name
from dit_jax.evaluate.names import Json


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
    blocks: list[Block] = [Prose(_about_diffs(diffs))]
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


def _about_diffs(counts: Json) -> str:
    if not counts:
        return "This evaluation did not record which held-out diffs it left out."
    total, failed, out = (counts.get(key) for key in ("held_out", "failed_gate", "excluded"))
    text = f"{total} diffs were held out, benign ones among them. "
    if failed is None:
        return (
            text
            + "The gate did not decide which of them do what their label says; none was left out."
        )
    text += f"{failed} of them failed the gate: they do not do what their label says. "
    if out:
        return text + f"{out} were left out of all numbers (`evaluate.exclude_failed`)."
    return (
        text
        + "None was left out."
        + (" `evaluate.exclude_failed` leaves out those that fail." if failed else "")
    )
