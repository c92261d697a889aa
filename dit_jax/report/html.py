"""A `Document` as one HTML page that needs nothing else: no network, no other file.

Models write part of it, so Jinja escapes every string, the only markup that is inserted as it is
are the plots drawn here, and a content security policy forbids any loading and all scripts but one
of ours, by its digest: it filters the table of answers, which is a plain table without it.
"""

import base64
import hashlib
import re
from pathlib import Path

from dit_jax.report import plots
from dit_jax.report.document import Document, Figure

_FOLDER = Path(__file__).parent.parent / "assets" / "report"


def _with_code(text: str) -> str:
    """Escaped text in which `backticks` became <code>."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _svg(figure: Figure) -> str:
    from markupsafe import Markup

    return Markup(plots.to_svg(figure.draw(), prefix=figure.name))


def render(document: Document) -> str:
    """Renders the page. Jinja is imported here, at the edge."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(with_code=_with_code, svg=_svg)
    environment.tests["named"] = lambda value, name: type(value).__name__ == name
    # Our own file, inserted as it is: escaping would break its quotes.
    css = Markup((_FOLDER / "report.css").read_text(encoding="utf-8"))
    script = (_FOLDER / "browse.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    colours = {name: value for name, value in plots.COLOURS.items()}
    return environment.get_template("report.html.j2").render(
        document=document,
        css=css,
        colours=colours,
        script=Markup(script),
        script_hash=Markup(digest),
    )
