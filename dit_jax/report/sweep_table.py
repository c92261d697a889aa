"""The table, the plot and the page that a sweep ends with: a metric of every run over the swept value."""

import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dit_jax.errors import DitError, did_you_mean
from dit_jax.evaluate.methods import METHODS
from dit_jax.formats.json_shape import is_number
from dit_jax.report import html, markdown, plots
from dit_jax.report.summary import SCORE_KEYS, SUMMARY_KEYS
from dit_jax.report.wording import duration
from dit_jax.runtime.artifacts import read_json, write_text
from dit_jax.runtime.outgoing import csv_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DONE, NOT_RUN = "done", "not run"
TIMES = "Times are those of all stages; diffs that a run took over from another one count with their time there."


class Number(NamedTuple):
    """A number of a summary, with its 95 % interval and the number of diffs where the summary has them."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def __str__(self) -> str:
        interval = "" if None in (self.low, self.high) else f" ({self.low:.3f}–{self.high:.3f})"
        return f"{self.mean:.3f}{interval}"


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
    also: tuple[Number | None, ...] = ()  # other numbers of the summary

    @property
    def shown(self) -> str:
        """The swept value as text."""
        value = self.value
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    @property
    def cells(self) -> list[str]:
        """As text: name, value, metric, interval, n, other numbers, time, status."""
        interval = "" if None in (self.low, self.high) else f"{self.low:.3f}–{self.high:.3f}"
        metric = "" if self.metric is None else f"{self.metric:.4f}"
        n = "" if self.n is None else str(self.n)
        also = ["" if number is None else str(number) for number in self.also]
        time = "" if self.seconds is None else duration(self.seconds)
        return [self.name, self.shown, metric, interval, n, *also, time, self.status]


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


def read_row(
    name: str,
    value: Any,
    metric: str,
    folder: Path,
    failure: str | None,
    also: Sequence[str] = (),
) -> Row:
    """The row of a run, from FOLDER/report/summary.json.

    Args:
        metric: dotted path of a number in the summary.
        failure: message of a failed run; its summary may be an old one and is not read.
        also: paths of other numbers.
    """
    nothing = (None,) * len(also)
    empty = Row(name, value, None, None, None, None, None, failure or NOT_RUN, nothing)
    file = folder / "report" / "summary.json"
    if failure or not file.exists():
        return empty
    try:
        summary = read_json(file, "run the stage 'report' again")
        number, *others = (_find(summary, path) for path in (metric, *also))
    except DitError as error:
        return empty._replace(status=str(error))
    if number is None:
        return empty._replace(status=f"the summary has no number under '{metric}'")
    seconds = _number(summary.get("seconds_total"))
    return Row(name, value, *number, seconds, DONE, tuple(others))


def _find(summary: Any, metric: str) -> Number | None:
    """The number at a dotted path, None where the summary has null. Raises DitError: there is no such place."""
    *path, last = metric.split(".")
    place = functools.reduce(lambda node, key: _get(node, key, metric), path, summary)
    number = _number(_get(place, last, metric))
    if number is None:
        return None
    low, high, n = (_number(place.get(key)) for key in ("ci_low", "ci_high", "n"))
    return Number(number, low, high, None if n is None else int(n))


def _get(place: Any, key: str, metric: str) -> Any:
    if not isinstance(place, dict) or key not in place:
        known = ", ".join(list(place)[:12]) if isinstance(place, dict) else "no keys"
        raise DitError(f"the summary has no '{metric}': where '{key}' should be, it has {known}")
    return place[key]


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


# ------------------------------------------------------------------ files


def write(
    rows: Sequence[Row],
    swept: str,
    metric: str,
    workdir: Path,
    name: str = "sweep",
    also: Sequence[str] = (),
) -> str:
    """Writes WORKDIR/NAME.csv, NAME.md, NAME.html and, if a run has a number, NAME.png. Returns the Markdown table.

    Args:
        also: what the other numbers of the rows are called.
    """
    done = [row for row in rows if row.metric is not None]
    title, alt = f"{metric} over {swept}", f"{metric} of every run over {swept}, with its interval"
    figure = plots.Plot(name, title, alt, functools.partial(plot, done, swept, metric))
    figures = [figure] if done else []
    markdown.save_plots(figures, workdir)
    result = f"{title}: {len(done)} of {len(rows)} runs are done."
    others = [f"# {one}" for one in also]
    page = html.render(
        "sweep",
        lead=result,
        sublead="Intervals are 95 % intervals over held-out diffs. Every run has a report of its own.",
        metric=metric,
        times=TIMES,
        titles=["Run", f"# {swept}", "# Metric", "# 95 % interval", "# n", *others, "# Time", "Status"],
        rows=[(row.cells, row.metric is not None) for row in rows],
        figure=figure if done else None,
    )  # fmt: skip
    table = to_markdown(rows, swept, metric, also)
    rest = f"The page of the sweep is `{name}.html`."
    write_text(workdir / f"{name}.html", page)
    write_text(workdir / f"{name}.csv", to_csv(rows, swept, metric, also))
    write_text(workdir / f"{name}.md", markdown.page(title, result, table, figures, rest))
    return table


def to_markdown(rows: Sequence[Row], swept: str, metric: str, also: Sequence[str] = ()) -> str:
    """A Markdown table; the mean over seeds below it where the seed is what is swept."""
    others = (f"# {one}" for one in also)
    titles = ("run", f"# {swept}", f"# {metric}", "# 95 % interval", "# n", *others, "# time", "")
    cells = [row._replace(status="" if row.status == DONE else row.status).cells for row in rows]
    parts = [
        markdown.table(titles, [[markdown.escape(cell) for cell in line] for line in cells]),
        TIMES,
    ]
    numbers = [row.metric for row in rows if row.metric is not None]
    if swept == "seed" and len(numbers) > 1:
        mean, spread = statistics.mean(numbers), statistics.stdev(numbers)
        parts.append(
            f"Mean over {len(numbers)} seeds: {mean:.4f}, standard deviation {spread:.4f}."
        )
    return "\n\n".join(parts)


def to_csv(rows: Sequence[Row], swept: str, metric: str, also: Sequence[str] = ()) -> str:
    """The rows as CSV, numbers in full."""
    columns = ["run", swept, metric, "ci_low", "ci_high", "n", "seconds", "status"]
    columns += [f"{one}{end}" for one in also for end in ("", " ci_low", " ci_high", " n")]

    def cells(row: Row) -> list[Any]:
        own = [row.name, row.shown, *row[2:-1]]
        return own + [cell for number in row.also for cell in number or (None,) * 4]

    return csv_text((dict(zip(columns, cells(row), strict=True)) for row in rows), columns)


def plot(rows: Sequence[Row], swept: str, metric: str) -> "Figure":
    """The metric with its intervals, over the swept value if the values are numbers, else a row for each run.

    The axis of the values is logarithmic where positive ones span more than a decade.
    """
    rows = list(rows)
    values = [_number(row.value) for row in rows]
    numeric = all(value is not None for value in values) and len(set(values)) == len(values)
    if numeric:
        rows.sort(key=lambda row: float(row.value))
    places = [float(row.value) if numeric else float(i) for i, row in enumerate(rows)]
    means = [float(row.metric or 0.0) for row in rows]
    figure, axes = plots.new_figure(3.4 if numeric else 0.8 + 0.36 * len(rows), 6.0)
    # Keys, names and values are not ours: a dollar sign would start a formula.
    label = metric.replace("$", r"\$")
    line: Any = {"color": plots.COLOURS["dit"], "lw": 1.6, "ms": 5}
    if numeric:
        # A line between seeds would mean nothing.
        axes.plot(places, means, "o" if swept == "seed" else "-o", **line)
        axes.set_xlabel(swept.replace("$", r"\$"))
        axes.set_ylabel(label)
        ticks = [row.shown for row in rows]
        if places[0] > 0 and places[-1] > 10 * places[0]:
            axes.set_xscale("log", base=2)
            ticks = plots.spaced(places, ticks)
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
            interval(place, row.low, row.high, color=plots.COLOURS["dit"], lw=1.2, alpha=0.6)
    if all(0 <= mean <= 1 for mean in means):
        (axes.set_ylim if numeric else axes.set_xlim)(-0.02, 1.02)
    axes.grid(axis="y" if numeric else "x", color=plots.COLOURS["line"])
    return figure
