"""The report's plots. Matplotlib is imported when the first one is drawn, and never opens a window.

A figure is made once in a few named colours: as PNG it stands on white, as SVG the colours become
CSS variables of the page, so that the same drawing follows its light or dark theme.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dit_jax.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Json = dict[str, Any]

# One colour per kind of evidence, the same in plots, tables and both themes of the page.
COLOURS = {
    "dit": "#0f766e",
    "method": "#4f6bb0",
    "control": "#8a94a3",
    "baseline": "#c07a1c",
    "ink": "#1b242d",
    "muted": "#5d6875",
    "line": "#d8dee5",
    "paper": "#fffffe",
}
_KINDS = {
    "dit": "DIT",
    "method": "asks the finetuned model",
    "control": "control",
    "baseline": "reads weights or logits",
}
MOST_DOTS = 200  # enough to show the shape; the mean is over all of them
_WIDTH = 4.8  # inches: legible at the width of a phone as well as in half a desktop page
_BESIDE: Any = {  # a number at the end of a bar
    "xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9, "color": COLOURS["ink"],
}  # fmt: skip
_STYLE: Any = {  # matplotlib types its keys as literals, which an import would be needed for
    "font.size": 10,
    "axes.titlesize": 10,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "dit_jax",
    "path.simplify": True,
}


class Plot(NamedTuple):
    """A plot of a page. `draw` makes the figure; as PNG it is <name>.png."""

    name: str
    title: str
    alt: str
    draw: "Callable[[], Figure]"


def new_figure(height: float, width: float = _WIDTH) -> "tuple[Figure, Axes]":
    """An empty figure, in inches, in the colours that `to_svg` turns into those of the page."""
    # It would tell of a home that cannot be written.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
    return figure, axes


def _without_frame(axes: "Axes") -> None:
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _horizontal_bars(
    labels: Sequence[str],
    intervals: Sequence[Json],
    colours: Sequence[str],
    label: str,
    width: float = _WIDTH,
) -> "Figure":
    """Bars of rates with whiskers and their values, first on top."""
    figure, axes = new_figure(0.75 + 0.36 * len(labels), width)
    rows = np.arange(len(labels))
    keys = ("mean", "ci_low", "ci_high")
    means, low, high = (np.array([item[key] for item in intervals]) for key in keys)
    axes.barh(rows, means, height=0.62, color=list(colours))
    errors = np.clip(np.stack([means - low, high - means]), 0, None)
    whiskers: Json = {"fmt": "none", "ecolor": COLOURS["ink"], "elinewidth": 1.1, "capsize": 2.5}
    axes.errorbar(means, rows, xerr=errors, **whiskers)
    for row, (mean, top) in enumerate(zip(means, high, strict=True)):
        axes.annotate(f"{100 * mean:.1f}", (top, row), **_BESIDE)
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel(label)
    axes.grid(axis="x")
    _without_frame(axes)
    return figure


def methods(entries: Sequence[tuple[str, str, Json]]) -> "Figure":
    """Exact match of every method. Entries: shown name, colour name, entry of `summary.methods`."""
    figure = _horizontal_bars(
        [label for label, _, _ in entries],
        [{**score, "mean": score["exact_match"]} for _, _, score in entries],
        [COLOURS[colour] for _, colour, _ in entries],
        "exact match, with 95 % interval over diffs",
        width=6.8,  # for Markdown, where it stands alone
    )
    from matplotlib.patches import Patch

    present = {colour for _, colour, _ in entries}
    figure.legend(
        handles=[Patch(color=COLOURS[c], label=text) for c, text in _KINDS.items() if c in present],
        loc="outside upper right", ncols=4, frameon=False, fontsize=9, handlelength=1,
        handleheight=1, labelcolor=COLOURS["ink"],
    )  # fmt: skip
    return figure


def gating(labels: Mapping[str, str], intervals: Mapping[str, Json]) -> "Figure":
    """How often a diff shows its label, by the trigger in the prompt. `labels`: key -> shown name."""
    keys = list(labels)
    return _horizontal_bars(
        [labels[key] for key in keys],
        [intervals[key] for key in keys],
        [COLOURS["dit" if key == "right_code" else "control"] for key in keys],
        "answers that show the label",
    )


def label_cross_entropy(
    labels: Mapping[str, str], values: Mapping[str, Sequence[float]], intervals: Mapping[str, Json]
) -> "Figure":
    """Cross-entropy of the label, a dot per diff and the mean with its interval."""
    figure, axes = new_figure(0.75 + 0.5 * len(labels))
    rng = np.random.default_rng(0)
    # Butt ends: a wide line's default ends would stick out beyond the interval.
    bar: Json = {"color": COLOURS["ink"], "lw": 5, "solid_capstyle": "butt"}
    for row, key in enumerate(labels):
        colour = COLOURS["dit" if key == "matched" else "control"]
        points = np.asarray(values[key], np.float64)
        if len(points) > MOST_DOTS:
            points = np.quantile(points, np.linspace(0, 1, MOST_DOTS))
        jitter = row + rng.uniform(-0.24, 0.24, len(points))
        axes.plot(points, jitter, "o", ms=3.2, mew=0, color=colour, alpha=0.45)
        item = intervals[key]
        axes.plot([item["ci_low"], item["ci_high"]], [row, row], **bar)
        axes.annotate(
            f"{item['mean']:.2f}", (item["mean"], row), (0, 11), textcoords="offset points",
            ha="center", va="bottom", fontsize=9.5, fontweight="bold", color=COLOURS["ink"],
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.set_ylim(len(labels) - 0.55, -0.72)
    axes.set_xlim(left=0)
    axes.set_xlabel("nats per token of the label")
    axes.grid(axis="x")
    _without_frame(axes)
    return figure


def reliability(bins: Sequence[Json]) -> "Figure":
    """A reliability diagram (DeGroot and Fienberg 1983): over the mean score of each bin, the share that is true.

    Args:
        bins: `said`, the mean score; `mean`, the share, with `ci_low` and `ci_high`; `n`, which sizes the points.
    """
    figure, axes = new_figure(3.2, width=4.4)
    axes.plot([0, 1], [0, 1], color=COLOURS["line"], lw=1.2, zorder=1)
    most = max(one["n"] for one in bins)
    for one in bins:
        x = one["said"]
        axes.plot([x, x], [one["ci_low"], one["ci_high"]], color=COLOURS["muted"], lw=1.4, zorder=2)
        size = 4 + 8 * (one["n"] / most) ** 0.5
        axes.plot([x], [one["mean"]], "o", ms=size, mew=0, color=COLOURS["dit"], zorder=3)
        side = 1 if x < 0.8 else -1
        axes.annotate(f"n = {one['n']}", (x, one["mean"]), (side * (3 + size / 2), -3), textcoords="offset points",
                      ha="left" if side > 0 else "right", fontsize=8, color=COLOURS["muted"])  # fmt: skip
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("score")
    axes.set_ylabel("share that is true")
    axes.grid()
    _without_frame(axes)
    return figure


def grade_distributions(entries: Sequence[tuple[str, Sequence[int], float]]) -> "Figure":
    """Divided bars of grades 1 to 5. Entries: shown name, the five counts, mean grade; first on top."""
    figure, axes = new_figure(1.0 + 0.32 * len(entries), width=6.8)
    rows = np.arange(len(entries))
    shares = np.array([np.asarray(counts) / max(1, sum(counts)) for _, counts, _ in entries])
    left = np.zeros(len(entries))
    for grade, strength in enumerate((0.12, 0.32, 0.54, 0.77, 1.0)):
        part = shares[:, grade]
        axes.barh(
            rows, part, 0.66, left, color=COLOURS["dit"], alpha=strength, lw=0, label=str(grade + 1)
        )
        left += part
    for row, (_, _, mean) in enumerate(entries):
        axes.annotate(f"{mean:.2f}", (1, row), **_BESIDE)
    # Names of files and graders are not ours: a dollar sign would start a formula.
    axes.set_yticks(rows, [name.replace("$", r"\$") for name, _, _ in entries])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel("share of the grades, and their mean")
    _without_frame(axes)
    figure.legend(
        title="grade", loc="outside upper right", ncols=5, frameon=False, fontsize=9,
        title_fontsize=9, handlelength=1, handleheight=1, labelcolor=COLOURS["ink"],
    )  # fmt: skip
    return figure


def grade_curves(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]], label: str
) -> "Figure":
    """Mean grade over a number on a logarithmic axis, a line for each series.

    Args:
        series: shown name -> (x, mean, low, high), x above 0.
        label: of the x axis.
    """
    figure, axes = new_figure(3.0, width=6.0)
    names = ("dit", "method", "baseline", "control")
    markers = "osD^"  # told apart without colours, too
    for index, (name, points) in enumerate(series.items()):
        x, mean, low, high = np.array(sorted(points), np.float64).T
        colour = COLOURS[names[index % len(names)]]
        style = "-" if index < len(names) else "--"
        marker = markers[index % len(markers)]
        shown = name.replace("$", r"\$")
        axes.plot(x, mean, style, marker=marker, ms=4, lw=1.6, color=colour, label=shown)
        axes.vlines(x, low, high, color=colour, lw=1.2, alpha=0.6)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in series.values() for point in points})
    axes.set_xticks(ticks, spaced(ticks, [f"{tick:g}" for tick in ticks]), fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0.9, 5.1)
    axes.set_yticks(range(1, 6))
    axes.set_ylabel("mean grade")
    axes.set_xlabel(label)
    axes.grid(axis="y")
    axes.tick_params(length=0, axis="y")
    axes.spines["left"].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=COLOURS["ink"])
    return figure


def spaced(ticks: Sequence[float], labels: Sequence[str]) -> list[str]:
    """Labels of rising ticks on a logarithmic axis, "" for one that would run into the label before it."""
    kept: list[str] = []
    last = 0.0
    for tick, label in zip(ticks, labels, strict=True):
        near = last and np.log(tick / last) < 0.05 * np.log(ticks[-1] / ticks[0])
        kept.append("" if near else label)
        last = last if near else tick
    return kept


def curve(points: Sequence[Sequence[float]], label: str) -> "Figure":
    """A loss over optimizer steps, on a logarithmic axis where it spans more than a decade."""
    figure, axes = new_figure(2.5)
    steps, loss = np.asarray(points, np.float64).T
    dense = len(loss) > 40
    faint: Json = {"alpha": 0.4, "label": "each step"} if dense else {}
    axes.plot(steps, loss, color=COLOURS["dit"], lw=1, **faint)
    if dense:
        # A running mean over the points that are there, so that both ends stay unbiased.
        window = np.ones(max(5, len(loss) // 20))
        weight = np.convolve(np.ones_like(loss), window, "same")
        mean = np.convolve(loss, window, "same") / weight
        axes.plot(steps, mean, color=COLOURS["dit"], lw=2, label=f"mean over {len(window)} of them")
        axes.legend(frameon=False, fontsize=9, labelcolor=COLOURS["ink"])
    if loss.min() > 0 and loss.max() / loss.min() > 10:
        axes.set_yscale("log")
        ticks = _log_ticks(float(loss.min()), float(loss.max()))
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.grid(axis="y")
    axes.tick_params(length=0, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.01)
    return figure


def _log_ticks(low: float, high: float) -> list[float]:
    """Round ticks that span [low, high]: 1, 2, 5 per decade, decades alone when they are many."""
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    ticks = [float(factor * 10**decade) for decade in decades for factor in factors]
    return [tick for tick in ticks if low * 0.9 <= tick <= high * 1.1]


# ------------------------------------------------------------------ formats


def to_png(figure: "Figure") -> bytes:
    """PNG on white, 200 dots per inch, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with _any_text():
        figure.savefig(
            buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None}
        )
    return buffer.getvalue()


@contextlib.contextmanager
def _any_text() -> Iterator[None]:
    """Matplotlib says nothing of characters that its font lacks: names are not ours, and it would print them raw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def to_svg(figure: "Figure", prefix: str) -> str:
    """An `<svg>` element for the body of a page: CSS variables for colours, no addresses in it.

    Args:
        figure: drawn with `COLOURS`.
        prefix: put before every id, so that figures on one page do not share any.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE), _any_text():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", svg)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # would reach the whole page
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)  # the page's own
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return printable(svg.strip(), lines=True)
