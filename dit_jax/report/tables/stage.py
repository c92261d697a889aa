"""The stage `tables`: the paper's tables, rebuilt from graded answers, beside those of our own runs."""

from pathlib import Path
from typing import Any

from dit_jax.config.keys import TEXTS, Key, Section
from dit_jax.report import html, markdown
from dit_jax.report.tables import build, pages
from dit_jax.report.tables.graded_files import read_graded
from dit_jax.runtime.artifacts import make_dir, package_versions, write_text
from dit_jax.runtime.outgoing import csv_text, show

TABLES = Section(
    "",
    (
        Key("results", str, "folder of graded CSV files", free=True),
        Key("runs", TEXTS, "workdirs of your own runs to show beside the paper", (), free=True),
    ),
    takes_others=lambda config: True,
)


def write_tables(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes WORKDIR/tables: tables.html, tables.csv, and tables.md with the plots.

    Args:
        config: `results` is a folder of graded CSV files, `runs` are workdirs of our own.

    Returns:
        Facts for the record of the stage: how many sets of grades, cells with a printed number, and those of
        them that differ from it.

    Raises:
        DitError: there are no graded answers, or a run has none.
    """
    graded, skipped = read_graded(config.results, TABLES.get(config, "runs"))
    values = pages.page_values(graded, skipped, config.results)
    figures = [table["figure"] for table in values["tables"] if table["figure"]]
    for number, group in enumerate(values["groups"], start=1):
        figures += group.plot(f"distribution_{number}", f"of {group.title}")
    folder = make_dir(workdir / "tables")
    markdown.save_plots(figures, folder)
    versions = [(name, str(value)) for name, value in package_versions().items()]
    write_text(folder / "tables.html", html.render("tables", versions=versions, **values))
    write_text(folder / "tables.md", _short_page(values, figures))
    write_text(folder / "tables.csv", csv_text(pages.csv_rows(graded), pages.CSV_COLUMNS))
    cells = [cell for cell in build.cells(graded) if cell.estimate is not None]
    for cell in cells:
        mean, low, high, n = vars(cell.estimate).values()
        note = "" if cell.printed is None else f"  printed {cell.printed:.2f}"
        show(f"{', '.join(cell.place)}: {mean:.2f} ({low:.2f}–{high:.2f}), n = {n}{note}")
    compared = [cell for cell in cells if cell.printed is not None]
    differ = sum(cell.differs for cell in compared)
    return {"graded": len(graded), "compared": len(compared), "differ": differ}


def _short_page(values: dict[str, Any], figures: list[Any]) -> str:
    """Markdown: the first table and the plots."""
    first = values["tables"][0]
    rows = [
        [markdown.named(name, "", name == "DIT"), *map(_cell, cells)]
        for name, cells in first["rows"].items()
    ]
    return markdown.page(
        "Diff Interpretation Tuning: the paper's tables",
        f"**{values['lead']}** {values['sublead']}",
        f"{first['title']}. {first['about']}\n\n{markdown.table([first['head'], *first['columns']], rows)}",
        figures,
        "All tables, paired tests and what was left out are in `tables.html`, all numbers in `tables.csv`.",
    )


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    estimate = cell["estimate"]
    text = f"{estimate.mean:.2f} ({estimate.low:.2f}–{estimate.high:.2f})" if estimate else "–"
    return markdown.named(text, cell["note"])
