"""The parts of a report, without a format: `markdown.py` and `html.py` each render all of them.

Texts are plain; `backticks` mark code. Whatever a model wrote is only ever held in `Quote`,
`Example`, `Entry` and `Transcript`, and every string is escaped by the renderers all the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


@dataclass(frozen=True)
class Named:
    """A cell: a name and a quieter line below it."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Rate:
    """A cell: a share of 1 with its interval, drawn as a bar in the colour of `kind`."""

    mean: float
    low: float
    high: float
    kind: str


@dataclass(frozen=True)
class Share:
    """A cell: a part of a whole (seconds of a stage), drawn as a bar beside its text."""

    text: str
    part: float


@dataclass(frozen=True)
class Quote:
    """A cell: text that a model or a dataset wrote, right, wrong or neither."""

    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Grade:
    """A cell: a mean on the 1–5 scale with its interval, and a quieter line (the number in print)."""

    mean: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True)
class Distribution:
    """A cell: how many grades are 1, 2, 3, 4 and 5, drawn as one divided bar."""

    counts: tuple[int, int, int, int, int]

    @property
    def shares(self) -> list[float]:
        """Percentages; zeros without any grade."""
        total = sum(self.counts) or 1
        return [100 * count / total for count in self.counts]


Cell = str | Named | Rate | Share | Quote | Grade | Distribution


@dataclass(frozen=True)
class Prose:
    text: str


@dataclass(frozen=True)
class Column:
    title: str
    number: bool = False


@dataclass(frozen=True)
class TableRow:
    cells: list[Cell]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows in groups; a group's title (may be empty) stands above its rows."""

    columns: list[Column]
    groups: list[tuple[str, list[TableRow]]]

    @property
    def stacks(self) -> bool:
        """Whether rows become blocks on a narrow page: there are bars in them, or more cells than fit."""
        rows = [row for _, rows in self.groups for row in rows]
        wide = Rate | Share | Grade | Distribution
        has_bars = any(isinstance(cell, wide) for row in rows for cell in row.cells)
        return has_bars or len(self.columns) > 4


@dataclass(frozen=True)
class Figure:
    """A plot. `draw` makes the matplotlib figure; markdown saves it as `<name>.png`."""

    name: str
    title: str
    alt: str
    draw: Callable[[], "MatplotlibFigure"]
    markdown_only: bool = False  # the page shows the same numbers as bars in a table


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str
    strong: bool = False


@dataclass(frozen=True)
class Tiles:
    tiles: list[Tile]


@dataclass(frozen=True)
class Example:
    """One held-out diff: what was asked, what DIT answered and what the others guessed."""

    topic: str
    question: str
    answer: str
    guess: str
    right: bool
    confidence: str
    others: list[tuple[str, Quote]]
    grades: list[str]


@dataclass(frozen=True)
class Examples:
    title: str
    examples: list[Example]


@dataclass(frozen=True)
class Entry:
    """One answer of a `Browser`. `method` is its shown name; grades are "grader 4" texts."""

    topic: str
    method: str
    question: str
    answer: str
    guess: str
    right: bool
    grades: list[str]


@dataclass(frozen=True)
class Browser:
    """Answers to search and to filter by method and by right and wrong; a plain table without scripts."""

    title: str
    methods: list[str]
    entries: list[Entry]


@dataclass(frozen=True)
class Transcript:
    """What one finetuned model wrote and a guesser read, folded away on the page."""

    title: str
    topic: str
    guess: Quote
    exchanges: list[tuple[str, str]]  # question, answer


@dataclass(frozen=True)
class Settings:
    """Names and values, folded away on the page."""

    title: str
    items: list[tuple[str, str]]
    folded: bool = True


Block = Prose | Table | Figure | Tiles | Examples | Browser | Transcript | Settings


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    title: str
    lead: str
    sublead: str
    opening: list[Block]
    sections: list[Section]
    footer: str

    @property
    def has_browser(self) -> bool:
        """Whether the page needs its script."""
        return any(isinstance(block, Browser) for part in self.sections for block in part.blocks)
