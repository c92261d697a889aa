"""The table and the plot that a sweep ends with: a metric of every run over the swept value."""

import csv
import functools
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dit_jax.errors import DitError, did_you_mean
from dit_jax.evaluate.methods import METHODS
from dit_jax.report.wording import SCORE_KEYS, SUMMARY_KEYS
from dit_jax.runtime.artifacts import read_json, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DONE, NOT_RUN = "done", "not run"
TIMES = "Seconds are those of all stages; diffs that a run took over from another one count with their time there."


class Row(NamedTuple):
    """One run: its metric with a 95 % interval where the summary has one, and why it has none otherwise."""

    name: str
    value: Any  # of the swept key, a JSON value
    metric: float | None
    low: float | None
    high: float | None
    n: int | None
    seconds: float | None
    status: str  # "done", "not run", or the message of a failure


def check_metric(metric: str) -> None:
    """Raises DitError for a metric that no summary has, as far as that is known before the first run."""
    head, *rest = metric.split(".")
    if head not in SUMMARY_KEYS:
        raise DitError(
            f"METRIC = '{metric}' is nothing in a summary: '{head}' is none of its keys"
            + did_you_mean(head, SUMMARY_KEYS, f", which are {', '.join(SUMMARY_KEYS)}")
        )
    if head != "methods" or not rest:
        return
    for name, known in zip(rest, (METHODS, SCORE_KEYS), strict=False):
        if name not in known:
            hint = did_you_mean(name, known, f": choose from {', '.join(known)}")
            raise DitError(f"METRIC = '{metric}' is nothing in a summary: unknown '{name}'{hint}")


def read_row(name: str, value: Any, metric: str, folder: Path, failure: str | None) -> Row:
    """The row of a run, from FOLDER/report/summary.json.

    Args:
      metric: dotted path of a number in the summary.
      failure: message of a failed run; its summary may be an old one and is not read.
    """
    empty = Row(name, value, None, None, None, None, None, failure or NOT_RUN)
    file = folder / "report" / "summary.json"
    if failure or not file.exists():
        return empty
    try:
        summary = read_json(file, "run the stage 'report' again")
        *path, last = metric.split(".")
        place = summary
        for key in path:
            place = _get(place, key, metric)
        number = _number(_get(place, last, metric))
    except DitError as error:
        return empty._replace(status=str(error))
    if number is None:
        return empty._replace(status=f"the summary has no number under '{metric}'")
    n = _number(place.get("n"))
    return Row(
        name,
        value,
        number,
        _number(place.get("ci_low")),
        _number(place.get("ci_high")),
        None if n is None else int(n),
        _number(summary.get("seconds_total")),
        DONE,
    )


def _get(place: Any, key: str, metric: str) -> Any:
    if not isinstance(place, dict) or key not in place:
        known = ", ".join(list(place)[:12]) if isinstance(place, dict) else "no keys"
        raise DitError(f"the summary has no '{metric}': where '{key}' should be, it has {known}")
    return place[key]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


# ------------------------------------------------------------------ files


def write(rows: Sequence[Row], swept: str, metric: str, workdir: Path, name: str = "sweep") -> str:
    """Writes WORKDIR/NAME.csv, NAME.md, NAME.html and, if a run has a number, NAME.png. Returns the Markdown table."""
    from dit_jax.report.sweep_page import sweep_page

    table = markdown(rows, swept, metric)
    text = f"# {metric} over {swept}\n\n{table}\n"
    done = [row for row in rows if row.metric is not None]
    if done:
        from dit_jax.report.plots import to_png

        write_bytes(workdir / f"{name}.png", to_png(plot(done, swept, metric)))
        text += f"\n![]({name}.png)\n"
    draw = functools.partial(plot, done, swept, metric) if done else None
    write_text(workdir / f"{name}.html", sweep_page(rows, _shown, swept, metric, draw, TIMES))
    write_text(workdir / f"{name}.csv", to_csv(rows, swept, metric))
    write_text(workdir / f"{name}.md", text)
    return table


def markdown(rows: Sequence[Row], swept: str, metric: str) -> str:
    """A Markdown table with aligned columns; the mean over seeds below it where the seed is what is swept."""
    cells = [["run", swept, metric, "95 % interval", "n", "seconds", ""]]
    for row in rows:
        interval = "" if row.low is None or row.high is None else f"{row.low:.3f}–{row.high:.3f}"
        cells.append(
            [
                row.name,
                _shown(row.value),
                "" if row.metric is None else f"{row.metric:.4f}",
                interval,
                "" if row.n is None else str(row.n),
                "" if row.seconds is None else f"{row.seconds:.1f}",
                "" if row.status == DONE else row.status,
            ]
        )
    cells = [[cell.replace("|", r"\|") for cell in line] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    widths[-1] = 0  # messages may be long
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines += ["", TIMES]
    numbers = [row.metric for row in rows if row.metric is not None]
    if swept == "seed" and len(numbers) > 1:
        mean, spread = statistics.mean(numbers), statistics.stdev(numbers)
        lines += [
            "",
            f"Mean over {len(numbers)} seeds: {mean:.4f}, standard deviation {spread:.4f}.",
        ]
    return "\n".join(lines)


def to_csv(rows: Sequence[Row], swept: str, metric: str) -> str:
    """The rows as CSV, numbers in full."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", swept, metric, "ci_low", "ci_high", "n", "seconds", "status"])
    for row in rows:
        writer.writerow([row.name, _shown(row.value), *row[2:]])
    return out.getvalue()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def plot(rows: Sequence[Row], swept: str, metric: str) -> "Figure":
    """The metric with its intervals, over the swept value if the values are numbers, else a row for each run.

    The axis of the values is logarithmic where positive ones span more than a decade.
    """
    from dit_jax.report.plots import COLOURS, new_figure, spaced

    rows = list(rows)
    values = [_number(row.value) for row in rows]
    numeric = all(value is not None for value in values) and len(set(values)) == len(values)
    if numeric:
        rows.sort(key=lambda row: float(row.value))
    places = [float(row.value) if numeric else float(i) for i, row in enumerate(rows)]
    means = [float(row.metric or 0.0) for row in rows]
    figure, axes = new_figure(3.4 if numeric else 0.8 + 0.36 * len(rows), 6.0)
    # Keys, names and values are not ours: a dollar sign would start a formula.
    label = metric.replace("$", r"\$")
    line: Any = {"color": COLOURS["dit"], "lw": 1.6, "ms": 5}
    if numeric:
        # A line between seeds would mean nothing.
        axes.plot(places, means, "o" if swept == "seed" else "-o", **line)
        axes.set_xlabel(swept.replace("$", r"\$"))
        axes.set_ylabel(label)
        ticks = [_shown(row.value) for row in rows]
        if places[0] > 0 and places[-1] > 10 * places[0]:
            axes.set_xscale("log", base=2)
            ticks = spaced(places, ticks)
        axes.set_xticks(places, ticks)
        axes.minorticks_off()
    else:
        axes.plot(means, places, "o", **line)
        axes.set_xlabel(label)
        axes.set_yticks(places, [row.name.replace("$", r"\$") for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    interval = axes.vlines if numeric else axes.hlines
    for place, row in zip(places, rows, strict=True):
        if row.low is not None and row.high is not None:
            interval(place, row.low, row.high, color=COLOURS["dit"], lw=1.2, alpha=0.6)
    if all(0 <= mean <= 1 for mean in means):
        (axes.set_ylim if numeric else axes.set_xlim)(-0.02, 1.02)
    axes.grid(axis="y" if numeric else "x", color=COLOURS["line"])
    return figure
