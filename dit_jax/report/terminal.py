"""The table that a run ends with: text in a pipe, bars on a terminal."""

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from dit_jax.errors import printable
from dit_jax.evaluate.method_table import GROUPS
from dit_jax.report.inputs import Json
from dit_jax.report.wording import between, colour, ordered_methods, percent, shown_name
from dit_jax.runtime.outgoing import show

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"dit": "bold cyan", "method": "blue", "control": "bright_black", "baseline": "yellow"}
_BAR = 20  # characters of a full bar
_BARS = "bars"
_HEADINGS = ["", "exact match", "95 % interval", "one token", "several", "token F1", "n"]

# What a narrow terminal has no room for, in the order in which it goes.
_LEFT_OUT = (
    (),
    (_BARS,),
    (_BARS, "one token", "several"),
    (_BARS, "one token", "several", "token F1"),
)


def _cells(name: str, entry: Json) -> list[str]:
    lengths = [entry["by_name_length"][key] for key in ("one_token", "multi_token")]
    return [
        printable(shown_name(name)),
        percent(entry["exact_match"]),
        between(entry),
        *("–" if score is None else percent(score["exact_match"]) for score in lengths),
        f"{entry['token_f1']:.3f}",
        str(entry["n"]),
    ]


def plain_table(summary: Json) -> str:
    """The headline table as lines of plain text."""
    methods = summary["methods"]
    rows = [_HEADINGS] + [_cells(name, methods[name]) for name in ordered_methods(methods)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def kinds_table(summary: Json) -> str:
    """What DIT and readers of the user's say about each kind of a topic's diffs, as lines of plain text.

    "" where topics have one diff.
    """
    rows = [
        [
            f"{shown_name(name)}, {kind}",
            percent(entry["exact_match"]),
            between(entry),
            str(entry["n"]),
        ]
        for kind, own in summary["by_variant"].items()
        for name, entry in own["methods"].items()
        if name == "dit" or ":" in name
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else []
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def rich_table(summary: Json, width: int) -> "Table":
    """The headline table as a rich renderable, with bars.

    Args:
        width: of the terminal, in characters. Where it is too narrow for everything, first the bars and then columns
            are left out; names of methods stay whole.
    """
    from rich.console import Console
    from rich.measure import Measurement

    unbounded = Console(width=10_000)
    for left_out in _LEFT_OUT:
        table = _rich_table(summary, left_out)
        if Measurement.get(unbounded, unbounded.options, table).maximum <= width:
            break
    return table


def _rich_table(summary: Json, left_out: Collection[str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = "Exact match on held-out topics"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_style="bold", title_justify="left")
    table.add_column("", no_wrap=True)
    if _BARS not in left_out:
        table.add_column("", no_wrap=True)
    shown = [i for i, heading in enumerate(_HEADINGS) if i and heading not in left_out]
    for i in shown:
        table.add_column(_HEADINGS[i], justify="right", no_wrap=True)
    methods = summary["methods"]
    for kind in GROUPS:
        group = [name for name in ordered_methods(methods) if methods[name]["kind"] == kind]
        for name in group:
            cells = _cells(name, methods[name])
            style = _STYLES[colour(name, kind)]
            bar = ("█" * round(_BAR * methods[name]["exact_match"])).ljust(_BAR, "·")
            table.add_row(
                Text(cells[0], style=style),
                *(() if _BARS in left_out else (Text(bar, style=style),)),
                *(cells[i] for i in shown),
                style="bold" if name == "dit" else "",
                end_section=name == group[-1],
            )
    return table


def headline_table(summary: Json) -> "Table | str":
    """The closing table: a rich renderable on a terminal, plain text in a pipe or without rich."""
    if sys.stdout.isatty():
        try:
            import rich

            return rich_table(summary, rich.get_console().width)
        except ImportError:
            pass
    return plain_table(summary)


def print_headline(summary: Json) -> None:
    """Prints the closing table; in a pipe unwrapped, whatever the width of the terminal."""
    table = headline_table(summary)
    if isinstance(table, str):
        show(table)
    else:
        import rich

        rich.print(table)
    if kinds := kinds_table(summary):
        show(
            f"\nThe table is about the diffs of the kind {summary['variant']!r}. By kind:\n{kinds}"
        )
