"""The stage `tables`: the paper's tables, rebuilt from graded answers, beside those of our own runs."""

from pathlib import Path
from typing import Any

from dit_jax.config.keys import TEXTS, Key, Section
from dit_jax.report import html, markdown
from dit_jax.report.results import to_csv
from dit_jax.report.tables import build, pages
from dit_jax.report.tables.graded import read_graded
from dit_jax.runtime.artifacts import make_dir, package_versions, write_bytes, write_text

TABLES = Section(
    "",
    (
        Key("results", str, "folder of graded CSV files", free=True),
        Key("runs", TEXTS, "workdirs of your own runs to show beside the paper", (), free=True),
    ),
    takes_others=lambda config: True,
)


def write_tables(config: Any, workdir: Path) -> dict[str, Any]:
    """Writes WORKDIR/tables: tables.md with its plots, tables.html, tables.csv.

    Args:
        config: `results` is a folder of graded CSV files, `runs` are workdirs of our own.

    Returns:
        Facts for the record of the stage: how many sets of grades, cells with a printed number, and those of
        them that differ from it.

    Raises:
        DitError: there are no graded answers, or a run has none.
    """
    graded, skipped = read_graded(config.results, TABLES.get(config, "runs"))
    document = pages.build_document(graded, skipped, package_versions(), config.results)
    folder = make_dir(workdir / "tables")
    for name, picture in markdown.pictures(document).items():
        write_bytes(folder / name, picture)
    write_text(folder / "tables.md", markdown.render(document))
    write_text(folder / "tables.html", html.render(document))
    write_text(folder / "tables.csv", to_csv(pages.csv_rows(graded), pages.CSV_COLUMNS))
    table_cells = build.cells(graded)
    off = build.disagreements(table_cells)
    compared = [
        cell for cell in table_cells if cell.printed is not None and cell.estimate is not None
    ]
    for cell in table_cells:
        if cell.estimate is not None:
            note = "" if cell.printed is None else f"  printed {cell.printed:.2f}"
            low, high = cell.estimate.low, cell.estimate.high
            name = ", ".join(cell.place)
            print(
                f"{name}: {cell.estimate.mean:.2f} ({low:.2f}–{high:.2f}), n = {cell.estimate.n}{note}"
            )
    return {"graded": len(graded), "compared": len(compared), "differ": len(off)}
