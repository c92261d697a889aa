"""Names, order, colours and numbers as every form of the report shows them."""

from collections.abc import Iterable, Mapping
from typing import Any

from dit_jax.errors import printable
from dit_jax.evaluate.method_table import GROUPS
from dit_jax.evaluate.methods import METHODS
from dit_jax.graders import GRADERS

Json = dict[str, Any]
UNSEEN = "_unseen"  # ends the name of a method's answers to wordings that were not trained on


def shown_name(method: str) -> str:
    """The name of a method as tables and plots show it."""
    if method.endswith(UNSEEN):
        return f"{shown_name(method.removesuffix(UNSEEN))}, unseen wordings"
    return METHODS[method].title if method in METHODS else method


def grader_title(grader: str) -> str:
    """The name of a grader and what it is."""
    known = GRADERS.get(grader.partition(":")[0])  # an instance may add its model
    return f"Grader: {grader} ({known.about})" if known else f"Grader: {grader}"


def colour(method: str, kind: str) -> str:
    """The colour name of a method in tables and plots."""
    return "dit" if method in ("dit", "dit_contrast") else kind


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of `METHODS`, unseen wordings after the seen ones."""
    names = list(METHODS)

    def rank(method: str) -> tuple[int, bool]:
        name = method.removesuffix(UNSEEN)
        return (names.index(name) if name in names else len(names)), name != method

    return sorted(methods, key=rank)


def ordered_methods(methods: Mapping[str, Json]) -> list[str]:
    """The methods of a summary as tables show them: by group, then in the order of `METHODS`."""
    return sorted(in_order(methods), key=lambda name: list(GROUPS).index(methods[name]["kind"]))


def as_code(text: str) -> str:
    """A name that is not ours inside prose: as code, in which nothing is markup."""
    return "`" + printable(" ".join(text.replace("`", "'").split())) + "`"


# ------------------------------------------------------------------ numbers as text


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def plural(count: int, noun: str) -> str:
    """`1 diff`, `2 diffs`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def duration(seconds: float) -> str:
    """`48 s` below two minutes, `3 min 20 s` above, with hours where there are any."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def between(item: Json) -> str:
    """An interval of a share, in percent."""
    return f"{100 * item['ci_low']:.1f}–{100 * item['ci_high']:.1f}"


def points(value: float) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference of grades."""
    return f"{value:+.2f}".replace("-", "−")


def p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float) -> str:
    """A count with narrow spaces between thousands."""
    return f"{round(value):,}".replace(",", "\u202f")


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"


def cost_name(name: str) -> str:
    """A method, or what else was measured beside the methods."""
    return shown_name(name) if name in METHODS else name.replace("_", " ")
