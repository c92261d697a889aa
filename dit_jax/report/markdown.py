"""A `Document` as GitHub-flavoured Markdown, with its plots as PNG files beside it."""

import re

from dit_jax.report import plots
from dit_jax.report.document import (
    Block,
    Browser,
    Cell,
    Distribution,
    Document,
    Examples,
    Figure,
    Grade,
    Named,
    Prose,
    Quote,
    Rate,
    Settings,
    Share,
    Table,
    TableRow,
    Tiles,
    Transcript,
)

# What means something inside a line, never at its start. An underscore within a word does not, nor does a bracket
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
    text = _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))
    # Entities for HTML, for lenient parsers.
    return _ENTITY.sub("&amp;", text).replace("<", "&lt;").replace(">", "&gt;")


def _cell(cell: Cell) -> str:
    match cell:
        case Named(name, note):
            return f"{escape(name)}<br><sub>{escape(note)}</sub>" if note else escape(name)
        case Rate(mean, low, high):
            return f"{100 * mean:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
        case Share(text):
            return escape(text)
        case Quote(text, right):
            return escape(text) + {True: " ✓", False: " ✗", None: ""}[right]
        case Grade(mean, low, high, note):
            text = f"{mean:.2f} ({low:.2f}–{high:.2f})"
            return f"{text}<br><sub>{escape(note)}</sub>" if note else text
        case Distribution(counts):
            return " / ".join(map(str, counts))
        case str():
            return escape(cell)


def _row(row: TableRow) -> str:
    cells = [_cell(cell) for cell in row.cells]
    if row.strong:
        cells = [re.sub(r"^(.+?)(<br>.*)?$", r"**\1**\2", cell) for cell in cells]
    return "| " + " | ".join(cells) + " |"


def _table(table: Table) -> str:
    head = "| " + " | ".join(escape(column.title) for column in table.columns) + " |"
    rule = "|" + "|".join(" ---: " if column.number else " --- " for column in table.columns) + "|"
    lines = [head, rule]
    for title, rows in table.groups:
        if title:
            lines.append(f"| _{escape(title)}_ |" + " |" * (len(table.columns) - 1))
        lines += [_row(row) for row in rows]
    return "\n".join(lines)


def _examples(block: Examples) -> str:
    lines = [
        f"**{block.title}**",
        "",
        "| Topic | Question | DIT's answer | Guess | Grades | Others |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for example in block.examples:
        others = "<br>".join(f"{escape(name)}: {_cell(quote)}" for name, quote in example.others)
        guess = _cell(Quote(example.guess, example.right))
        grades = "<br>".join(map(escape, example.grades))
        cells = [escape(example.topic), escape(example.question), escape(example.answer)]
        lines.append("| " + " | ".join([*cells, f"**{guess}**", grades, others]) + " |")
    return "\n".join(lines)


def _settings(block: Settings) -> str:
    rows = "\n".join(f"| {escape(name)} | {escape(value)} |" for name, value in block.items)
    return f"**{escape(block.title)}**\n\n| Name | Value |\n| --- | --- |\n{rows}"


def _block(block: Block) -> str:
    match block:
        case Prose(text):
            return text
        case Table():
            return _table(block)
        case Figure(name, title, alt):
            return f"**{escape(title)}**\n\n![{escape(alt.translate(_ROUND))}]({name}.png)"
        case Tiles(tiles):
            rows = [f"- {tile.label}: **{tile.value}** ({tile.note})" for tile in tiles]
            return "\n".join(rows)
        case Examples():
            return _examples(block)
        case Browser(title):
            return f"{escape(title)}: see `report.html`."
        case Transcript(title):
            return f"{escape(title)}: see `report.html`."
        case Settings():
            return _settings(block)


def render(document: Document) -> str:
    """The report as Markdown. It shows the files of `pictures`, which belong beside it."""
    head = [f"# {document.title}", f"**{document.lead}** {document.sublead}"]
    parts = [*head, *map(_block, document.opening)]
    for section in document.sections:
        parts += [f"## {section.title}", *map(_block, section.blocks)]
    return "\n\n".join([*parts, document.footer]) + "\n"


def pictures(document: Document) -> dict[str, bytes]:
    """The PNG files that the Markdown shows, by file name."""
    blocks = [block for section in document.sections for block in section.blocks]
    return {
        f"{block.name}.png": plots.to_png(block.draw())
        for block in blocks
        if isinstance(block, Figure)
    }
