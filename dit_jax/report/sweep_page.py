"""The page of a sweep: one metric of every run over the swept value, as a curve and as a table."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dit_jax.report import html
from dit_jax.report.document import (
    Block,
    Column,
    Document,
    Figure,
    Prose,
    Quote,
    Section,
    Table,
    TableRow,
)
from dit_jax.report.grading import as_code
from dit_jax.report.wording import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


def sweep_page(
    rows: Sequence[Any],
    shown: Callable[[Any], str],
    swept: str,
    metric: str,
    draw: "Callable[[], MatplotlibFigure] | None",
    times: str,
) -> str:
    """One self-contained HTML page.

    Args:
        rows: `sweep_table.Row`s.
        shown: a swept value as text.
        draw: makes the plot; None without a run that is done.
        times: what the seconds count.
    """
    done = sum(row.metric is not None for row in rows)
    figures: list[Block] = []
    if draw is not None:
        alt = f"{metric} of every run over {swept}, with its interval"
        figures = [Figure("sweep", f"{metric} over {swept}", alt, draw)]
    columns = [
        Column("Run"),
        Column(swept, True),
        Column("Metric", True),
        Column("95 % interval", True),
        Column("n", True),
        Column("Time", True),
        Column("Status"),
    ]
    table = Table(columns, [("", [_row(row, shown(row.value)) for row in rows])])
    return html.render(
        Document(
            title="Diff Interpretation Tuning: a sweep",
            lead=f"{metric} over {swept}: {done} of {len(rows)} runs are done.",
            sublead="Intervals are 95 % intervals over held-out diffs. Every run has a report of its own.",
            opening=[],
            sections=[
                Section(
                    "curve",
                    "The runs",
                    [
                        Prose(f"The metric is {as_code(metric)} of each summary. {times}"),
                        *figures,
                        table,
                    ],
                )
            ],
            footer="Every number is in the CSV file of the same name, beside this file.",
        )
    )


def _row(row: Any, value: str) -> TableRow:
    interval = "" if row.low is None or row.high is None else f"{row.low:.3f}–{row.high:.3f}"
    return TableRow(
        [
            row.name,
            value,
            "" if row.metric is None else f"{row.metric:.4f}",
            interval,
            "" if row.n is None else str(row.n),
            "" if row.seconds is None else duration(row.seconds),
            # A message is as long as it is: like what models wrote, it breaks anywhere and widens nothing.
            row.status if row.metric is not None else Quote(row.status),
        ]
    )
