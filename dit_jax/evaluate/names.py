"""Names, order, colours and numbers as every form of the report shows them."""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

# name -> (shown name, what it sees)
METHODS = {
    "dit": ("DIT", "the diff in the model, a DIT adapter, a question; no trigger"),
    "base_question": ("Question", "the diff in the model, the same questions; the adapter off"),
    "base_question_trigger": (
        "Question with trigger",
        "the same with the secret code in the prompt",
    ),
    "twenty_questions": ("20 questions", "everyday questions; a guesser names the topic of the answers"),
    "twenty_questions_trigger": (
        "20 questions with trigger",
        "the same with the secret code in every prompt",
    ),
    "generated_story": ("Generated story", "a story of the finetuned model; a guesser names its topic"),
    "no_diff": ("DIT without a diff", "the adapter on the unchanged model"),
    "shuffled_diff": ("DIT, another diff", "the adapter and the diff of another topic"),
    "noise_diff": ("DIT, noise diff", "the adapter and noise with the norms of the diff"),
    "name_reading": ("Name reading", "weights only: cosine of the diff with the names' embeddings"),
    "logit_difference": ("Logit difference", "logits without trigger, with and without the diff"),
    "attribute_oracle": (
        "Attribute oracle",
        "weights, and the world's own table of every topic's attributes",
    ),
}
GROUPS = {
    "method": "Methods that ask the model",
    "control": "Controls: they should find nothing",
    "baseline": "Baselines without training: they read the weights or the logits",
}


def shown_name(method: str) -> str:
    """The name of a method as tables and plots show it."""
    return METHODS.get(method, (method, ""))[0]


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
