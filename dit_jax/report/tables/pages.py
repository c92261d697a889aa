"""The tables as a `Document`, for Markdown and HTML, and as rows for `tables.csv`."""

from __future__ import annotations

from collections.abc import Sequence

from dit_jax.evaluate.methods import METHODS as NAMES
from dit_jax.report import plots
from dit_jax.report.document import (
    Block,
    Column,
    Distribution,
    Document,
    Figure,
    Grade,
    Named,
    Prose,
    Section,
    Settings,
    Table,
    TableRow,
)
from dit_jax.report.document import Cell as Shown
from dit_jax.report.grading import as_code, method_name
from dit_jax.report.tables import build
from dit_jax.report.tables.build import Cell
from dit_jax.report.tables.graded import Graded
from dit_jax.report.tables.paper import METHODS, MODELS, TABLES, places
from dit_jax.report.wording import Json, p_text, signed

ROW_TITLES = {
    "hidden_topic": "Method",
    "news": "Method",
    "scaling": "Training diffs",
    "rank": "Rank of the diffs",
    "trigger": "Trigger",
    "cross": "Adapter and diffs",
}
CSV_COLUMNS = (
    "table", "row", "column", "experiment", "file", "grader", "printed", "mean", "ci_low", "ci_high", "n",
    "excluded", "grade_1", "grade_2", "grade_3", "grade_4", "grade_5",
)  # fmt: skip


def _row_name(table: str, row: str) -> str:
    return method_name(row) if table in ("hidden_topic", "news") else row


def _ordered_rows(table: str, rows: set[str]) -> list[str]:
    """Methods of the paper first, then those of our runs as reports order them; sizes by number."""
    if table not in ("hidden_topic", "news"):
        return sorted(rows, key=build.row_order)
    order = [*METHODS, "dit_unseen", *NAMES]
    return sorted(rows, key=lambda row: (order.index(row) if row in order else len(order), row))


def _ordered_columns(columns: set[str]) -> list[str]:
    return sorted(columns, key=lambda c: (MODELS.index(c) if c in MODELS else len(MODELS), c))


# ------------------------------------------------------------------ the paper's tables


def _shown(cell: Cell | None) -> Shown:
    if cell is None:
        return "–"
    if cell.estimate is None:
        return Named(
            "–", f"printed {cell.printed:.2f}" if cell.printed is not None else "no grades"
        )
    printed = f"printed {cell.printed:.2f}" if cell.printed is not None else ""
    return Grade(cell.estimate.mean, cell.estimate.low, cell.estimate.high, printed)


def _paper_table(table: str, members: list[Cell]) -> Table:
    by_place = {(cell.place.row, cell.place.column): cell for cell in members}
    columns = _ordered_columns({cell.place.column for cell in members})
    rows = [
        TableRow(
            [_row_name(table, row), *(_shown(by_place.get((row, column))) for column in columns)],
            strong=row == "dit",
        )
        for row in _ordered_rows(table, {cell.place.row for cell in members})
    ]
    return Table([Column(ROW_TITLES[table]), *map(Column, columns)], [("", rows)])


def _curve(table: str, members: list[Cell]) -> Figure | None:
    """A curve over numbers of diffs or ranks; None with fewer than two points in every column."""
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    for cell in members:
        if cell.estimate is not None and cell.place.row.isdigit():
            point = (cell.estimate.mean, cell.estimate.low, cell.estimate.high)
            series.setdefault(cell.place.column, []).append((float(cell.place.row), *point))
    if not any(len(points) > 1 for points in series.values()):
        return None
    label = "training diffs" if table == "scaling" else "rank of the diffs"
    return Figure(
        table,
        f"Mean grade by {label}",
        f"Mean grade with its interval over the {label}",
        lambda: plots.grade_curves(series, label),
    )


def _paper_sections(table_cells: Sequence[Cell]) -> list[Section]:
    sections = []
    for table, (title, text) in TABLES.items():
        members = [cell for cell in table_cells if cell.place.table == table]
        if not members:
            continue
        blocks: list[Block] = [Prose(text), _paper_table(table, members)]
        figure = _curve(table, members) if table in ("scaling", "rank") else None
        sections.append(Section(table, title, [*blocks, figure] if figure else blocks))
    return sections


# ------------------------------------------------------------------ all files, tests, noise


def _name_of(item: Graded) -> Named:
    method = build.method_of(item)
    if item.own:
        return Named(method_name(method), item.grader)
    if method:
        return Named(item.name, method_name(method))
    notes = {"scaling": "DIT, {} training diffs", "cross": "{}"}
    return Named(item.name, ", ".join(notes[p.table].format(p.row) for p in places(item)))


def _distributions(graded: Sequence[Graded]) -> Section:
    groups = []
    blocks: list[Block] = []
    experiments = build.by(graded, lambda item: item.experiment)
    for number, (experiment, members) in enumerate(experiments.items(), start=1):
        rows, bars = [], []
        for item in members:
            estimate, counts = build.estimate(item), build.distribution(item)
            if estimate is None:
                rows.append(TableRow([_name_of(item), "–", "no grades", "0"]))
                continue
            grade = Grade(estimate.mean, estimate.low, estimate.high)
            rows.append(TableRow([_name_of(item), grade, Distribution(counts), str(estimate.n)]))
            name = _name_of(item)
            label = f"{name.name}, {name.note}" if item.own and name.note else name.name
            bars.append((label, counts, estimate.mean))
        groups.append((experiment, rows))
        if bars:
            blocks.append(
                Figure(
                    f"distribution_{number}",
                    experiment,
                    f"Divided bars: the grades 1 to 5 of every method of {experiment}",
                    lambda bars=bars: plots.grade_distributions(bars),  # type: ignore[misc]
                    markdown_only=True,
                )
            )
    text = (
        "All files of grades, also those that are in no table of the paper. The bar divides the grades into "
        "1 (left, faint) to 5 (right, full colour); in Markdown and `tables.csv` they are counts."
    )
    columns = [Column("Answers"), Column("Mean grade"), Column("Grades 1 to 5"), Column("n", True)]
    return Section("distributions", "Distributions", [Prose(text), Table(columns, groups), *blocks])


def _comparisons(found: Sequence[build.Comparison]) -> Section | None:
    if not found:
        return None
    groups = []
    for title, members in build.by(found, lambda item: item.group).items():
        rows = []
        for item in members:
            pair = item.difference
            name = f"{method_name(item.first)} − {method_name(item.second)}"
            interval = f"{signed(pair.low)} to {signed(pair.high)}"
            rows.append(
                TableRow(
                    [
                        name,
                        signed(pair.mean),
                        interval,
                        p_text(pair.p_value),
                        p_text(item.adjusted),
                        str(pair.n),
                    ]
                )
            )
        groups.append((title, rows))
    titles = ("Difference", "95 % interval", "p", "p, Holm", "n")
    columns = [Column("Compared"), *(Column(title, True) for title in titles)]
    text = (
        "Differences of the mean grade on the same diffs (bootstrap over diffs; p of a two-sided randomisation "
        "test, and adjusted by Holm's method within each group)."
    )
    return Section("tests", "Paired tests", [Prose(text), Table(columns, groups)])


def _noise(graded: Sequence[Graded]) -> Section | None:
    found = build.judge_noise(graded)
    if not found:
        return None
    rows = [
        TableRow(
            [
                item.grader or "the paper's grader",
                str(item.pairs),
                str(item.grades),
                f"{100 * item.agree:.1f} %",
                f"{item.sd:.2f}",
            ]
        )
        for item in found
    ]
    titles = ("Pairs", "Grades", "Same grade again", "SD of one grade")
    text = (
        "The same label and answer were sometimes graded more than once, in one file or in several. Answers that "
        "are the label itself are left out. The standard deviation of one grade over the root of n is what the "
        "grader alone adds to the error of a mean; the intervals above hold it already."
    )
    table = Table([Column("Grader"), *(Column(title, True) for title in titles)], [("", rows)])
    return Section("noise", "Noise of the grader", [Prose(text), table])


def _excluded(graded: Sequence[Graded], skipped: dict[str, str]) -> Section:
    rows = [
        TableRow([item.file, _name_of(item), reason, str(count)])
        for item in graded
        for reason, count in item.excluded.items()
    ]
    total = sum(len(item.rows) for item in graded)
    missing = sum(sum(item.excluded.values()) for item in graded)
    text = f"{total + missing} graded answers were read and {missing} of them left out."
    text += " A missing grade is a gap, never a 1." if missing else ""
    blocks: list[Block] = [Prose(text)]
    if rows:
        columns = [Column("File"), Column("Answers"), Column("Reason"), Column("Rows", True)]
        blocks.append(Table(columns, [("", rows)]))
    if skipped:
        blocks.append(Settings("CSV files without grades", list(skipped.items()), folded=False))
    return Section("excluded", "What was left out", blocks)


def build_document(
    graded: Sequence[Graded], skipped: dict[str, str], versions: Json, folder: str
) -> Document:
    """All tables.

    Args:
        graded, skipped: from `graded.read_graded`.
        versions: of the packages, as in versions.json.
        folder: where the files were, as the config says it.
    """
    table_cells = build.cells(graded)
    both = [cell for cell in table_cells if cell.printed is not None and cell.estimate is not None]
    off = build.disagreements(table_cells)
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
    opening: list[Block] = []
    if off:
        listed = [
            (f"{cell.place.table}, {cell.place.row}, {cell.place.column}",
             f"printed {cell.printed:.2f}, rebuilt {cell.estimate.mean:.3f}")
            for cell in off if cell.estimate is not None
        ]  # fmt: skip
        opening.append(Settings("Means that differ from print", listed, folded=False))
    optional = [_comparisons(build.comparisons(graded)), _noise(graded)]
    setup = Settings("Versions", [(name, str(value)) for name, value in versions.items()])
    return Document(
        title="Diff Interpretation Tuning: the paper's tables",
        lead=lead,
        sublead=sublead,
        opening=opening,
        sections=[
            *_paper_sections(table_cells),
            _distributions(graded),
            *(section for section in optional if section is not None),
            _excluded(graded, skipped),
            Section("setup", "Versions", [setup]),
        ],
        footer="Every number of the tables is in tables.csv, beside this file.",
    )


def csv_rows(graded: Sequence[Graded]) -> list[dict[str, object]]:
    """Rows of `tables.csv`: every cell of the paper's tables, then every file of grades (table "all")."""
    rows: list[dict[str, object]] = []
    for cell in build.cells(graded):
        table, row, column = cell.place
        printed = "" if cell.printed is None else f"{cell.printed:.2f}"
        numbers = {} if cell.graded is None else _numbers(cell.graded)
        rows.append({"table": table, "row": row, "column": column, "printed": printed, **numbers})
    for item in graded:
        place = {"table": "all", "row": item.name, "column": item.experiment}
        rows.append({**place, **_numbers(item)})
    return rows


def _numbers(item: Graded) -> dict[str, object]:
    estimate = build.estimate(item)
    numbers: dict[str, object] = {
        "experiment": item.experiment,
        "file": item.file,
        "grader": item.grader,
    }
    numbers["excluded"] = sum(item.excluded.values())
    if estimate is not None:
        counts = {f"grade_{i}": n for i, n in enumerate(build.distribution(item), start=1)}
        means = zip(
            ("mean", "ci_low", "ci_high"), (estimate.mean, estimate.low, estimate.high), strict=True
        )
        numbers |= {name: f"{value:.4f}" for name, value in means} | counts | {"n": estimate.n}
    return numbers
