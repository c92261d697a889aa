"""A short page of GitHub-flavoured Markdown beside a report: its headline, its plots, and where the rest is."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_jax.errors import printable
from dit_jax.report.plots import Plot, to_png
from dit_jax.runtime.artifacts import write_bytes

# Characters with a meaning inside a line, never at its start. An underscore within a word has none, nor has a bracket
# before anything but the address of a link. The last line keeps bare addresses and words from becoming links and
# pictures.
_SPECIAL = re.compile(
    r"""[\\`*~$|@] | (?<![^\W_])_ | _(?![^\W_]) | \](?=\()
    | :(?=//) | :(?=[\w+-]+:) | (?<=mailto): | (?<=xmpp): | (?<=www)\.""",
    re.VERBOSE | re.IGNORECASE,
)
_ROUND = str.maketrans("[]", "()")  # a bracket could end the description of a picture
_ENTITY = re.compile(r"&(?=[#\w])")


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, HTML, link or table cell in it."""
    text = _SPECIAL.sub(r"\\\g<0>", printable(" ".join(text.split())))
    # Entities for HTML, for lenient parsers.
    return _ENTITY.sub("&amp;", text).replace("<", "&lt;").replace(">", "&gt;")


def named(name: str, note: str, strong: bool = False) -> str:
    """A cell: a name, and a quieter line below it."""
    name = f"**{escape(name)}**" if strong else escape(name)
    return f"{name}<br><sub>{escape(note)}</sub>" if note else name


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with aligned columns, as far as cells are short; cells are escaped already.

    A title that starts with "# " is one of numbers. A row of one cell is the title of those that follow.
    """
    head = [escape(title.removeprefix("# ")) for title in titles]
    lines = [[*line, *[""] * (len(titles) - len(line))] for line in (head, *rows)]
    columns = zip(*lines, strict=True)
    widths = [max([3, *(len(cell) for cell in cells if len(cell) < 40)]) for cells in columns]
    shown = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    ends = [":" if title.startswith("# ") else "-" for title in titles]
    rules = ["-" * (width + 1) + end for width, end in zip(widths, ends, strict=True)]
    return "\n".join([shown[0], f"|{'|'.join(rules)}|", *shown[1:]])


def page(title: str, lead: str, table: str, plots: Iterable[Plot], rest: str) -> str:
    """The page. Its pictures are those that `save_plots` writes beside it; `rest` says where the report is."""
    shown = [
        f"**{escape(plot.title)}**\n\n![{escape(plot.alt.translate(_ROUND))}]({plot.name}.png)"
        for plot in plots
    ]
    return "\n\n".join([f"# {title}", lead, table, *shown, rest]) + "\n"


def save_plots(plots: Iterable[Plot], folder: Path) -> None:
    """Writes plots as FOLDER/<name>.png. Raises DitError when the file system refuses."""
    for plot in plots:
        write_bytes(folder / f"{plot.name}.png", to_png(plot.draw()))
