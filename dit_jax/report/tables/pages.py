"""What the page of the tables shows, and the rows of `tables.csv`."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from dit_jax.evaluate.methods import METHODS as OURS
from dit_jax.report import plots
from dit_jax.report.graded import Graded, Group, grade_group
from dit_jax.report.tables import build
from dit_jax.report.tables.build import Cell
from dit_jax.report.tables.paper import METHODS, MODELS, TABLES, places
from dit_jax.report.wording import UNSEEN, as_code, shown_name

Json = dict[str, Any]

OF_METHODS = ("hidden_topic", "news")  # tables whose rows are methods
CURVES = {"scaling": "training diffs", "rank": "rank of the diffs"}
CSV_COLUMNS = (
    "table", "row", "column", "experiment", "file", "grader", "printed", "mean", "ci_low", "ci_high", "n",
    "excluded", "grade_1", "grade_2", "grade_3", "grade_4", "grade_5",
)  # fmt: skip


# ------------------------------------------------------------------ the paper's tables


def paper_tables(cells: Sequence[Cell]) -> list[Json]:
    """The tables that have a cell: name, title, what it is about, columns, rows by their shown name, curve."""
    found = []
    for name, members in build.by(cells, lambda cell: cell.place.table).items():
        title, about, head = TABLES[name]
        by_place = {(cell.place.row, cell.place.column): cell for cell in members}
        columns = _in_order({cell.place.column for cell in members}, MODELS)
        rows = {
            shown_name(row) if name in OF_METHODS else row: [
                _shown(by_place.get((row, column))) for column in columns
            ]
            for row in _rows(name, {cell.place.row for cell in members})
        }
        figure = _curve(name, members)
        found.append(
            {"name": name, "title": title, "about": about, "head": head, "columns": columns}
            | {"rows": rows, "figure": figure}
        )
    return found


def _in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Names in a given order, others behind them by the alphabet."""
    return sorted(names, key=lambda x: (order.index(x) if x in order else len(order), x))


def _rows(table: str, rows: Iterable[str]) -> list[str]:
    """Methods of the paper first, then those of our runs as reports order them; sizes by number."""
    if table not in OF_METHODS:
        return sorted(rows, key=build.row_order)
    return _in_order(rows, [*METHODS, f"dit{UNSEEN}", *OURS])


def _shown(cell: Cell | None) -> Json | None:
    if cell is None:
        return None
    printed = "" if cell.printed is None else f"printed {cell.printed:.2f}"
    note = printed if cell.estimate or printed else "no grades"
    return {"estimate": cell.estimate, "note": note}


def _curve(table: str, members: list[Cell]) -> plots.Plot | None:
    """A curve over numbers of diffs or ranks; None with fewer than two points in every column."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for cell in members:
        if cell.estimate is not None and cell.place.row.isdigit():
            point = (cell.estimate.mean, cell.estimate.low, cell.estimate.high)
            series.setdefault(cell.place.column, []).append((float(cell.place.row), *point))
    if table not in CURVES or not any(len(points) > 1 for points in series.values()):
        return None
    label = CURVES[table]
    draw = functools.partial(plots.grade_curves, series, label)
    alt = f"Mean grade with its interval over the {label}"
    return plots.Plot(table, f"Mean grade by {label}", alt, draw)


# ------------------------------------------------------------------ all files, and the page


def name_of(item: Graded) -> tuple[str, str]:
    """The name of a set of grades, and a note."""
    method = build.method_of(item)
    if item.own:
        return shown_name(method), item.grader
    if method:
        return item.name, shown_name(method)
    notes = {"scaling": "DIT, {} training diffs", "cross": "{}"}
    return item.name, ", ".join(notes[p.table].format(p.row) for p in places(item))


def groups_of(graded: Sequence[Graded]) -> list[Group]:
    """All sets of grades, by experiment."""
    experiments = build.by(graded, lambda item: item.experiment)
    return [
        grade_group(title, [(*name_of(item), item) for item in members])
        for title, members in experiments.items()
    ]


def page_values(graded: Sequence[Graded], skipped: dict[str, str], folder: str) -> Json:
    """What `tables.html.j2` needs but the versions.

    Args:
        graded, skipped: from `graded_files.read_graded`.
        folder: where the files were, as the config says it.
    """
    cells = build.cells(graded)
    both = [cell for cell in cells if cell.printed is not None and cell.estimate is not None]
    off = [
        (", ".join(cell.place), f"printed {cell.printed:.2f}, rebuilt {cell.estimate.mean:.3f}")
        for cell in both
        if cell.differs and cell.estimate
    ]
    if not both:
        lead = "None of the graded files belongs to a number that the paper prints."
    elif off:
        lead = f"{len(both) - len(off)} of the paper's {len(both)} rebuilt means agree with print."
    else:
        lead = f"All {len(both)} means of the paper that have their grades here agree with print."
    own = sorted({item.experiment for item in graded if item.own})
    sublead = (
        f"From {len(graded)} sets of graded answers in {as_code(folder)}, to the second decimal. "
        "Intervals are 95 % bootstrap intervals over diffs; printed numbers without grades stand alone."
    )
    if own:
        sublead += f" Own runs stand beside the paper's columns: {', '.join(map(as_code, own))}."
    compared: dict[str, dict[str, Json]] = {}
    for test in build.comparisons(graded):
        pair, name = test.difference, f"{shown_name(test.first)} − {shown_name(test.second)}"
        compared.setdefault(test.group, {})[name] = {
            "difference": pair.mean,
            "ci_low": pair.low,
            "ci_high": pair.high,
            "p_value": pair.p_value,
            "p_holm": test.adjusted,
            "n": pair.n,
        }
    tables, noise = paper_tables(cells), build.judge_noise(graded)
    parts = {table["name"]: table["title"] for table in tables} | {
        "distributions": "Distributions",
        "tests": "Paired tests" if compared else None,
        "noise": "Noise of the grader" if noise else None,
        "excluded": "What was left out",
        "setup": "Versions",
    }
    missing = sum(sum(item.excluded.values()) for item in graded)
    return {
        "lead": lead,
        "sublead": sublead,
        "parts": parts,
        "off": off,
        "tables": tables,
        "groups": groups_of(graded),
        "comparisons": compared,
        "noise": noise,
        "counts": {"read": missing + sum(len(item.rows) for item in graded), "missing": missing},
        "excluded": [
            (item.file, *name_of(item), reason, count)
            for item in graded
            for reason, count in item.excluded.items()
        ],
        "skipped": list(skipped.items()),
    }


def csv_rows(graded: Sequence[Graded]) -> list[Json]:
    """Rows of `tables.csv`: every cell of the paper's tables, then every file of grades (table "all")."""
    rows: list[Json] = []
    for cell in build.cells(graded):
        printed = "" if cell.printed is None else f"{cell.printed:.2f}"
        numbers = {} if cell.graded is None else _numbers(cell.graded)
        rows.append({**cell.place._asdict(), "printed": printed, **numbers})
    for item in graded:
        rows.append({"table": "all", "row": item.name, "column": item.experiment, **_numbers(item)})
    return rows


def _numbers(item: Graded) -> Json:
    numbers: Json = {name: getattr(item, name) for name in ("experiment", "file", "grader")}
    numbers["excluded"] = sum(item.excluded.values())
    if (estimate := item.estimate()) is not None:
        means = {"mean": estimate.mean, "ci_low": estimate.low, "ci_high": estimate.high}
        numbers |= {name: f"{value:.4f}" for name, value in means.items()} | {"n": estimate.n}
        numbers |= {f"grade_{i}": n for i, n in enumerate(item.distribution(), start=1)}
    return numbers
