"""Pages of HTML that need nothing else: no network, no other file. Their texts are in `assets/report/*.html.j2`.

Models write part of them, so Jinja escapes every string, the only markup that is inserted as it is are
the plots drawn here, and a content security policy forbids any loading and all scripts but one of ours,
by its digest: it filters and sorts tables, which are plain tables without it.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_jax.errors import printable
from dit_jax.report import plots, wording

_FOLDER = Path(__file__).parent.parent / "assets" / "report"


def _with_code(text: str) -> str:
    """Escaped text in which `backticks` became <code>."""
    from markupsafe import Markup, escape

    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _visible(value: Any) -> Any:
    """A text with control and bidirectional characters escaped; markup and other values as they are."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return printable(value, lines=True)


def _svg(plot: plots.Plot) -> str:
    from markupsafe import Markup

    return Markup(plots.to_svg(plot.draw(), prefix=plot.name))


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of nested dicts by their dotted keys, as text."""
    if isinstance(value, dict) and value:
        inner = [_leaves(x, f"{prefix}.{key}" if prefix else str(key)) for key, x in value.items()]
        return [leaf for leaves in inner for leaf in leaves]
    return [(prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


def render(template: str, scripts: Sequence[str] = (), **values: Any) -> str:
    """Renders `assets/report/<template>.html.j2` with these scripts as one. Jinja is imported here, at the edge."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts = ("percent", "between", "plural", "p_text", "number", "duration", "size", "cost_name")
    environment.filters |= {name: getattr(wording, name) for name in texts}
    environment.filters |= {"with_code": _with_code, "svg": _svg, "leaves": _leaves}
    # Our own files, inserted as they are: escaping would break their quotes.
    css, *codes = (Markup((_FOLDER / name).read_text("utf-8")) for name in ("report.css", *scripts))
    code = Markup("").join(codes)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return environment.get_template(f"{template}.html.j2").render(
        css=css, script=code, script_hash=Markup(digest), colours=plots.COLOURS,
        points=wording.points, signed=wording.signed, **values,
    )  # fmt: skip
