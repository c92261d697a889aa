"""Names, order, colours and numbers as every form of the report shows them."""

from collections.abc import Mapping
from typing import Any

from dit_jax.evaluate.methods import GROUPS, METHODS
from dit_jax.graders import GRADERS

Json = dict[str, Any]

# What report/summary.json holds, and each of its methods.
SUMMARY_KEYS = (
    "methods", "differences_from_dit", "dit_by_name_length", "dit_by_wording", "dit_by_each_wording", "none",
    "none_intervals", "label_cross_entropy", "label_cross_entropy_intervals", "gating", "gating_intervals", "seconds",
    "seconds_total", "cost", "excluded", "peak_memory_bytes", "config", "versions", "grades",
)  # fmt: skip
SCORE_KEYS = (
    "kind", "exact_match", "ci_low", "ci_high", "token_f1", "token_f1_low", "token_f1_high", "n", "by_name_length",
    "guesser",
)  # fmt: skip


def shown_name(method: str) -> str:
    """The name of a method as tables and plots show it."""
    return METHODS[method].title if method in METHODS else method


def grader_title(grader: str) -> str:
    """The name of a grader and what it is."""
    known = GRADERS.get(grader.partition(":")[0])  # an instance may add its model
    return f"Grader: {grader} ({known.about})" if known else f"Grader: {grader}"


def colour(method: str, kind: str) -> str:
    """The colour name of a method in tables and plots."""
    return "dit" if method == "dit" else kind


def ordered_methods(methods: Mapping[str, Json]) -> list[str]:
    """Methods as tables show them: by kind, then in the order of `METHODS`."""
    kinds, names = list(GROUPS), list(METHODS)

    def rank(name: str) -> tuple[int, int]:
        known = names.index(name) if name in names else len(names)
        return kinds.index(methods[name]["kind"]), known

    return sorted(methods, key=rank)


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
    return f"{100 * item['ci_low']:.1f}–{100 * item['ci_high']:.1f}"


def points(value: float) -> str:
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
