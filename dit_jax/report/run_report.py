"""The report stage: `summary.json`, `report.md` with plots, `report.html`, the answers as CSV, the closing table."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_jax.evaluate.methods import GROUPS, held_out_answers
from dit_jax.evaluate.questions import subject_of
from dit_jax.report import html, markdown
from dit_jax.report.grading import grade_run, summarise_grades
from dit_jax.report.results import RESULTS_FILE, results_csv
from dit_jax.report.sections import build_document
from dit_jax.report.summary import read_inputs, summarise
from dit_jax.report.wording import colour, ordered_methods, percent, shown_name
from dit_jax.runtime.artifacts import (
    PathLike,
    make_dir,
    peak_memory_bytes,
    write_bytes,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"dit": "bold cyan", "method": "blue", "control": "bright_black", "baseline": "yellow"}
_BAR = 20  # characters of a full bar in the terminal


def write_report(workdir: PathLike, grading: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Writes WORKDIR/report from what the evaluate stage left, each file whole or not at all.

    The plots and the pages are written first and `summary.json` last, so that a summary is never
    there without the pages that show it.

    Args:
      workdir: the run's folder, with `evaluate/`, `stages/`, `config.json` and `versions.json`.
      grading: how to grade (see `grading.grade_run`); None: as the `evaluate` section of config.json says.

    Returns:
      The content of `summary.json`.

    Raises:
      DitError: an input is missing, truncated or not valid (the message names the file), or the
        folder cannot be written.
    """
    start = time.perf_counter()
    inputs = read_inputs(workdir)
    summary = summarise(inputs)
    folder = make_dir(Path(workdir) / "report")
    subject = subject_of(inputs.config)
    settings = inputs.config.get("evaluate", {}) if grading is None else grading
    grades = grade_run(inputs.rows, settings, subject, Path(workdir))
    summary["grades"] = summarise_grades(grades)
    pictures = markdown.pictures(build_document(summary, inputs, grades))
    # Most of this stage's time is spent by now; the pages show it with the other stages'.
    summary["seconds"]["report"] = round(time.perf_counter() - start, 3)
    summary["seconds_total"] = round(sum(summary["seconds"].values()), 3)
    summary["peak_memory_bytes"] = max(summary["peak_memory_bytes"] or 0, peak_memory_bytes())
    document = build_document(summary, inputs, grades)
    for name, picture in pictures.items():
        write_bytes(folder / name, picture)
    write_text(folder / "report.md", markdown.render(document))
    write_text(folder / "report.html", html.render(document))
    write_text(
        folder / RESULTS_FILE,
        results_csv(held_out_answers(inputs.rows), subject),
    )
    write_json(folder / "summary.json", summary)
    return summary


# ------------------------------------------------------------------ the terminal


def _interval(score: dict[str, Any]) -> str:
    return f"{100 * score['ci_low']:.1f}–{100 * score['ci_high']:.1f}"


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    lengths = [entry["by_name_length"][key] for key in ("one_token", "multi_token")]
    return [
        shown_name(name),
        percent(entry["exact_match"]),
        _interval(entry),
        *("–" if score is None else percent(score["exact_match"]) for score in lengths),
        f"{entry['token_f1']:.3f}",
        str(entry["n"]),
    ]


_HEADINGS = ["", "exact match", "95 % interval", "one token", "several", "token F1", "n"]


def plain_table(summary: dict[str, Any]) -> str:
    """The headline table as lines of plain text."""
    methods = summary["methods"]
    rows = [_HEADINGS] + [_cells(name, methods[name]) for name in ordered_methods(methods)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def rich_table(summary: dict[str, Any]) -> "Table":
    """The headline table as a rich renderable, with bars."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        title="Exact match on held-out topics",
        title_style="bold",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("", no_wrap=True)
    for heading in _HEADINGS[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    methods = summary["methods"]
    names = ordered_methods(methods)
    for kind in GROUPS:
        group = [name for name in names if methods[name]["kind"] == kind]
        for name in group:
            first, *rest = _cells(name, methods[name])
            style = _STYLES[colour(name, kind)]
            bar = "█" * round(_BAR * methods[name]["exact_match"])
            table.add_row(
                Text(first, style=style),
                Text(bar.ljust(_BAR, "·"), style=style),
                *rest,
                style="bold" if name == "dit" else "",
                end_section=name == group[-1],
            )
    return table


def headline_table(summary: dict[str, Any]) -> "Table | str":
    """The closing table: a rich renderable on a terminal, plain text in a pipe or without rich."""
    if not sys.stdout.isatty():
        return plain_table(summary)
    try:
        return rich_table(summary)
    except ImportError:
        return plain_table(summary)


def print_headline(summary: dict[str, Any]) -> None:
    """Prints the closing table; in a pipe unwrapped, whatever the width of the terminal."""
    table = headline_table(summary)
    if isinstance(table, str):
        print(table, flush=True)
    else:
        import rich

        rich.print(table)
