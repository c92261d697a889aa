"""The paper's tables: the numbers that it prints, and where a file of grades belongs in them.

Files are recognised by their folder (which diffs) and their name (which method); a file that is not
recognised is still listed with all its numbers, under its own name.
"""

import re
from typing import NamedTuple

from dit_jax.organisms.diffs_keys import DIFFS
from dit_jax.report.graded import Graded

PAPER = "Paper"
MODELS = ("Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Gemma3-1B", "Gemma3-4B")
METHODS = (
    "dit",
    "generated_story",
    "base_question",
    "twenty_questions",
    "base_question_trigger",
    "twenty_questions_trigger",
)
FULL = "all parameters"
FULL_ROWS = {"all": FULL, "linear": "all linear layers"}  # by diffs.parameters of a run of ours
START, RANDOM = "zero-width space at the start", "zero-width space at a random position"
NEWS_ON_TOPIC, TOPIC_ON_NEWS = "news adapter on topic diffs", "topic adapter on news diffs"


class Place(NamedTuple):
    """A cell of a table: its table, row and column."""

    table: str
    row: str
    column: str


# title, what it is about, what its rows are; in the order of the tables
TABLES = {
    "hidden_topic": (
        "Hidden topic",
        "Mean grade of the answers to the question what topic a finetuned model was trained on.",
        "Method",
    ),
    "news": (
        "News stories",
        "The same for finetunes on news stories; the label is a headline.",
        "Method",
    ),
    "scaling": (
        "Data scaling",
        "DIT by the number of weight diffs that the adapter was trained on, optimizer steps held constant.",
        "Training diffs",
    ),
    "rank": (
        "Ranks that the adapter never saw",
        "DIT by the LoRA rank of the diffs; the adapter was trained on rank 1. The paper finds it flat from "
        "rank 1 to 64, between 4.54 and 4.79.",
        "Rank of the diffs",
    ),
    "trigger": ("Other triggers", "DIT on diffs whose trigger is a zero-width space.", "Trigger"),
    "cross": (
        "The adapter of another behaviour",
        "Adapters asked about diffs of the behaviour that they were not trained on: the floor.",
        "Adapter and diffs",
    ),
}


def _by_method(
    table: str, models: tuple[str, ...], rows: dict[str, tuple[float, ...]]
) -> dict[Place, float]:
    return {
        Place(table, method, model): value
        for method, values in rows.items()
        for model, value in zip(models, values, strict=True)
    }


# Mean grades as printed, n = 100 held-out diffs each.
PRINTED: dict[Place, float] = {
    **_by_method(
        "hidden_topic",
        MODELS,
        {
            "dit": (4.29, 4.76, 4.71, 4.14, 4.82),
            "base_question": (1.17, 1.21, 1.08, 1.17, 1.12),
            "twenty_questions": (2.12, 1.38, 1.82, 1.46, 1.55),
            "base_question_trigger": (2.79, 3.28, 3.12, 3.40, 4.09),
            "twenty_questions_trigger": (4.66, 4.73, 4.72, 4.62, 4.62),
        },
    ),
    **_by_method(
        "news",
        ("Qwen3-4B", "Gemma3-4B"),
        {
            "dit": (4.22, 4.56),
            "generated_story": (3.65, 4.11),
            "base_question": (1.00, 1.00),
            "twenty_questions": (1.98, 2.25),
        },
    ),
    **{
        Place("scaling", str(diffs), "Qwen3-4B"): value
        for diffs, value in {
            4: 1.19, 18: 1.60, 72: 3.24, 145: 3.78, 291: 4.17, 582: 4.49, 1165: 4.73, 4660: 4.78,
        }.items()
    },
    Place("rank", FULL, "Qwen3-4B"): 2.75,
    Place("rank", FULL, "Gemma3-4B"): 4.58,
    Place("trigger", START, "Qwen3-4B"): 4.66,
    Place("trigger", RANDOM, "Qwen3-4B"): 4.58,
}  # fmt: skip
TRAIN_DIFFS = 4660  # of the whole hidden-topic training set

# Names of files, most special first.
_METHODS = (
    (r"base-question-plus-trigger", "base_question_trigger"),
    (r"base-question-dit", "dit"),
    (r"base-question", "base_question"),
    (r"^no-trigger$", "twenty_questions"),
    (r"^trigger$", "twenty_questions_trigger"),
    (r"gen-story", "generated_story"),
    (r"news-story-summary-requests", "twenty_questions"),
)


def model_of(experiment: str) -> str:
    """The model that a folder's name tells: `…-gemma-3-4b-…` -> Gemma3-4B; without a family Qwen3."""
    size = re.search(r"(?:^|[-_])(\d+(?:[._]\d+)?)b(?:$|[-_])", experiment, re.IGNORECASE)
    if not size:
        return PAPER
    family = "Gemma3" if "gemma" in experiment.casefold() else "Qwen3"
    return f"{family}-{size[1].replace('_', '.')}B"


def method_of(graded: Graded) -> str:
    """The method of a file, one of `METHODS`, or "" if its name is none that the tables have."""
    if graded.own:
        return graded.name
    if _trigger(graded):
        if "20-questions" in graded.name:
            return "twenty_questions"
        return "base_question" if graded.name.endswith("base-question") else "dit"
    if graded.name.startswith("opposing-task") or _scaling(graded):
        return ""
    return next((method for pattern, method in _METHODS if re.search(pattern, graded.name)), "")


def places(graded: Graded) -> list[Place]:
    """The cells that a file of the paper, or a method of a run of ours, belongs to."""
    if graded.own:
        return _own_places(graded)
    column, method = model_of(graded.experiment), method_of(graded)
    if graded.name.startswith("opposing-task"):
        row = NEWS_ON_TOPIC if graded.subject == "topic" else TOPIC_ON_NEWS
        question = ", its original question" if graded.name.endswith("orig-q") else ""
        return [Place("cross", row + question, column)]
    if divisor := _scaling(graded):
        return [Place("scaling", str(TRAIN_DIFFS // divisor), column)]
    if not method:
        return []
    if row := _trigger(graded):
        return [Place("trigger", row, column)] if method == "dit" else []
    if row := _rank(graded):
        return [Place("rank", row, column)] if method == "dit" else []
    if graded.subject == "summary":
        return [Place("news", method, column)]
    found = [Place("hidden_topic", method, column)]
    return [*found, Place("rank", "1", column)] if method == "dit" else found


def _scaling(graded: Graded) -> int:
    found = re.search(r"dsdiv(\d+)$", graded.name)
    return max(1, int(found[1])) if found else 0


def _trigger(graded: Graded) -> str:
    text = f"{graded.experiment} {graded.name}".casefold()
    if not re.search(r"unicode|zero-?_?width", text):
        return ""
    return RANDOM if "random" in text else START


def _rank(graded: Graded) -> str:
    if re.search(r"all-?_?params|full-?_?finetune", graded.experiment):
        return FULL
    found = re.search(r"rank-?_?0*(\d+)", graded.experiment)
    return found[1] if found else ""


def _own_places(graded: Graded) -> list[Place]:
    """Main table by method; DIT also by its number of diffs, and by rank or trigger of the diffs, as its config says.

    Runs that change one of them stand in that table alone; those of one sweep share a column.
    """

    def column(name: str) -> str:
        return f"{name} · {graded.grader}" if graded.grader else name

    config = graded.config
    diffs, train = config.get("diffs", {}), config.get("train", {})
    elsewhere = config.get("evaluate", {}).get("adapter")  # one that was trained on other diffs
    parameters, behaviour = DIFFS.get(diffs, "parameters"), str(diffs.get("behaviour", ""))
    table = "news" if graded.subject == "summary" else "hidden_topic"
    found = []
    if not elsewhere and not train.get("max_diffs"):
        found.append(Place(table, graded.name, column(graded.experiment)))
    if graded.name != "dit" or table == "news":
        return found
    series = column(graded.series)
    if not elsewhere:
        size = train.get("max_diffs") or config.get("data", {}).get("train_topics")
        found += [Place("scaling", str(size), series)] if size else []
    if "zwsp" in behaviour:
        row = RANDOM if "random" in behaviour else START
        found.append(Place("trigger", row, series))
    elif parameters in FULL_ROWS:
        found.append(Place("rank", FULL_ROWS[parameters], series))
    elif diffs.get("rank") and not train.get("max_diffs"):
        found.append(Place("rank", str(diffs["rank"]), series))
    return found
