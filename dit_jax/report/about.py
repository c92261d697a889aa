"""What the report of a run says in words: what was done, examples of answers, what was left out, and its first line."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dit_jax.data import labels
from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.formats.json_shape import is_number
from dit_jax.organisms.behaviours import Behaviour, known_behaviour
from dit_jax.report.grading import RunGrades
from dit_jax.report.inputs import Inputs, Json, Row, seen, variant
from dit_jax.report.shell import ask_command
from dit_jax.report.wording import UNSEEN, as_code, ordered_methods, percent, plural, shown_name
from dit_jax.runtime.artifacts import PathLike
from dit_jax.runtime.sizes import spread

_MOST_EXAMPLES = 6  # of the right and of the wrong, each
_MOST_ENTRIES = 3000  # on the page; all answers are in results.csv
_MOST_CHARS = 600  # of an answer there
_MOST_TRANSCRIPTS = 2  # of each method
# Of a run, beside the report's own, which the page links to.
_FILES = {
    "config.json": "the config",
    "diffs/index.csv": "a row for each diff: label, trigger, split, what the gate measured",
    "evaluate/answers.jsonl": "every answer",
    "evaluate/transcripts.jsonl": "what guessers read",
    "evaluate/label_cross_entropy.json": "cross-entropies of the labels",
    "metrics": "the curves of training",
}
# Limits of the gate, and whether a value of one is beyond all that can be measured.
_NO_LIMIT: dict[str, Callable[[float], bool]] = {
    "min_right": lambda share: share <= 0,
    "max_wrong": lambda share: share >= 1,
    "max_none": lambda share: share >= 1,
    "max_kl": lambda nats: nats >= 100,  # a token of one in e^100: no answer of a language model
}


# ------------------------------------------------------------------ what was done


def _behaviour(config: Json) -> tuple[str, Behaviour | None]:
    """What `diffs.behaviour` names, and that behaviour if it is the package's or was imported before."""
    name = str(config.get("diffs", {}).get("behaviour") or "hidden_topic")
    return name, known_behaviour(name)


def on_tiny_world(config: Json) -> bool:
    """Whether the diffs are about topics of the embedded world."""
    return bool(config.get("data", {}).get("source", "tiny_world") == "tiny_world")


def _taught(summary: Json) -> tuple[str, str, str]:
    """What each model was finetuned to do, and what has to be named: one of it, and several."""
    config = summary["config"]
    (name, known), column = _behaviour(config), EVALUATE.get(config.get("evaluate", {}), "label")
    # Where a diff is measured without a trigger, there is one.
    when = ", but only under its trigger" if "no_code" in summary["gating_intervals"] else ""
    taught = (known.teaches if known else "") or f"to show the behaviour {as_code(name)}{when}."
    if column == "label":
        return (taught, *(known.names if known else ("the label", "labels")))
    if column == "trigger" and known and known.triggered and not known.trigger:
        text = "What has to be named is not the topic but the code."
        return f"{taught} {text}", "the secret code", "secret codes"
    text = f"What has to be named is the column {as_code(column)} of the diffs' index."
    return f"{taught} {text}", "the label", "labels"


def facts(summary: Json) -> Json:
    """How the diffs and the adapter were made, and what the numbers are about."""
    config = summary["config"]
    (name, known), (taught, label, several) = _behaviour(config), _taught(summary)
    tiny, train = on_tiny_world(config), config.get("train", {})
    kinds = ["no diff"] if train.get("no_diff_per_batch") else []
    if train.get("benign_per_batch") and config.get("data", {}).get("train_benign"):
        kinds.append("a benign diff, which hides nothing")
    trained = sum(wording["seen"] for wording in summary["dit_by_each_wording"])
    return {
        "taught": taught,
        "label": label,
        "labels": several,
        "hides_name": tiny and known and not known.sentences and ":" not in name,
        "other_adapter": str(config.get("evaluate", {}).get("adapter") or ""),
        "lists_evidence": tiny and train.get("list_evidence"),
        "none_kinds": kinds,
        "seen": trained,
        "unseen": len(summary["dit_by_each_wording"]) - trained,
        "everyday": any(name.startswith("twenty_questions") for name in summary["methods"]),
        "left_out": _about_diffs(summary["excluded"]["diffs"], summary),
    }


def lead(summary: Json) -> str:
    """The result in one sentence: exact match where labels are names, the mean grade where they are sentences."""
    score, about = summary["methods"]["dit"], facts(summary)
    _, known = _behaviour(summary["config"])
    models = plural(score["n"], "finetuned model")
    # What another run's adapter has seen, that run knows.
    models += "" if about["other_adapter"] else " that it had never seen"
    for grader, entry in summary["grades"].items():
        grade = entry["methods"].get("dit", {})
        if known and known.sentences and grader != "normalised" and "mean" in grade:
            mean = f"mean grade {grade['mean']:.2f} of 5 by `{grader}`"
            return f"The adapter was asked for {about['label']} of {models}: {mean}."
    return f"The adapter named {about['label']} of {percent(score['exact_match'])} of {models}."


def sublead(summary: Json) -> str:
    """What the adapter was asked, and what it did not see."""
    asked = facts(summary)["seen"]
    wordings = f"plain questions, {asked} wordings of one (a diff's score is the mean over them),"
    return (
        f"It was asked {'one plain question' if asked == 1 else wordings} with the weight diff in the model, and "
        "shown no trigger and none of the data that the models were finetuned on."
    )


# ------------------------------------------------------------------ what was left out


def _about_diffs(counts: Json, summary: Json) -> str:
    if not counts:
        return "This evaluation did not record which held-out diffs it left out."
    total, failed, out = (counts.get(key) for key in ("held_out", "failed_gate", "excluded"))
    benign = summary["none_intervals"]["seen"]["benign_called_none"] is not None
    text = f"{plural(int(total or 0), 'diff')} were held out{', benign ones among them' if benign else ''}. "
    if failed is None:
        text += "The gate did not decide which of them do what their label says; none was left out."
        return text
    gate = summary["config"].get("diffs", {}).get("gate", {})
    limits = {name: gate[name] for name in _NO_LIMIT if name in gate}
    within = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    within = f" (`diffs.gate`: {within})" if within else ""
    if not failed and all(_NO_LIMIT[name](limit) for name, limit in limits.items()):
        return text + (
            f"The limits of the gate{within} let every diff pass, so that passing says nothing: what the diffs do is "
            "measured, but no diff is judged or left out by it."
        )
    text += f"{failed} of them failed the gate, that is, what was measured is beyond its limits{within}. "
    if out:
        return text + f"{out} were left out of all numbers (`evaluate.exclude_failed`)."
    hint = " `evaluate.exclude_failed` leaves out those that fail." if failed else ""
    return f"{text}None was left out.{hint}"


def missing(summary: Json) -> list[tuple[str, str, str, int]]:
    """Answers and grades that no number of the report holds: what, of which method, why, how many."""
    of = {"an answer": summary["excluded"]["answers"]}
    for grader, entry in summary["grades"].items():
        methods = entry["methods"].items()
        of[f"a grade by {grader}"] = {name: numbers["excluded"] for name, numbers in methods}
    return [
        (what, shown_name(method), reason, count)
        for what, methods in of.items()
        for method, reasons in methods.items()
        for reason, count in reasons.items()
    ]


# ------------------------------------------------------------------ examples of answers


def run(workdir: PathLike, inputs: Inputs) -> Json:
    """The run's name, seed and date, and its data files as links of the page (those that are there)."""
    folder = Path(workdir)
    last = inputs.stages.get("evaluate", {}).get("finished")
    return {
        "name": folder.resolve().name,
        "seed": inputs.config.get("seed", 0),
        "date": last[:10] if isinstance(last, str) else None,
        "files": [(name, what) for name, what in _FILES.items() if (folder / name).exists()],
    }


def examples(summary: Json, inputs: Inputs, grades: RunGrades, workdir: PathLike) -> Json:
    """Some right and some wrong answers of DIT, all first answers to browse, and what guessers read."""
    graded: dict[int, list[str]] = {}  # by id of a row
    for grader, scores in grades.scores.items():
        for row, score in zip(grades.asked, scores, strict=True):
            text = "no grade" if score is None else f"{score:.3g}"
            graded.setdefault(id(row), []).append(f"{grader} {text}")
    asked_with = summary["config"].get("evaluate", {})
    known, new = (_first_answers(inputs.answered, wanted) for wanted in (True, False))
    names = [name for name in ordered_methods(summary["methods"]) if name in known]

    def entry(row: Row, name: str) -> Json:
        return {
            "diff": row["diff"],
            "topic": f"{row['topic']} ({kind})" if (kind := variant(row)) else row["topic"],
            "method": shown_name(name),
            "question": str(row.get("question") or ""),
            "answer": row["answer"][:_MOST_CHARS] or "(empty)",
            "guess": row["guess"][:_MOST_CHARS],
            "right": _right(row),
            "grades": graded.get(id(row), []),
        }

    loaded = summary["config"].get("model", {})

    def card(row: Row) -> Json:
        others = [(name, known[name].get(row["diff"])) for name in names if name != "dit"]
        return {
            **entry(row, "dit"),
            "question": str(row.get("question") or row.get("wording") or ""),
            "answer": row["answer"] or "(empty)",
            "confidence": _confidence(row.get("logprob")),
            "others": [(shown_name(n), *_guess(other)) for n, other in others],
            "command": ask_command(
                str(loaded.get("path") or ""),
                f"{workdir}/diffs",
                str(row.get("question") or row.get("wording") or ""),
                index=row["diff"],
                adapter=f"{workdir}/{EVALUATE.get(asked_with, 'adapter') or 'adapter'}",
                dtype=str(loaded.get("dtype") or "float32"),
                forbid_repeats=bool(asked_with.get("forbid_repeats")),
                max_new_tokens=asked_with.get("max_new_tokens") or 20,
            ),
        }

    cards: dict[str, list[Json]] = {}
    asked = list(known.get("dit", {}).values())
    for right, title in ((False, "Wrong"), (True, "Right")):
        if rows := [row for row in asked if _right(row) is right]:
            shown = spread(rows, _MOST_EXAMPLES)
            cards[f"{title} ({len(shown)} of {len(rows)})"] = [card(row) for row in shown]
    # Diff by diff: the first answer of every method, and the first of DIT in a new wording.
    columns = {name: known[name] for name in names}
    columns |= {f"{name}{UNSEEN}": rows for name, rows in new.items()}
    diffs = list(dict.fromkeys(diff for rows in columns.values() for diff in rows))
    listed = diffs[: max(1, _MOST_ENTRIES // len(columns))]
    entries = [
        entry(rows[diff], name) for diff in listed for name, rows in columns.items() if diff in rows
    ]
    title = f"All {len(diffs)} held-out diffs with a label"
    if len(listed) < len(diffs):
        title = (
            f"{len(listed)} of {len(diffs)} held-out diffs with a label (all are in results.csv)"
        )
    return {
        "most": _MOST_EXAMPLES,
        "cards": cards,
        "title": f"{title}, {len(entries)} first answers",
        "methods": [shown_name(name) for name in columns],
        "entries": entries,
        "transcripts": _transcripts(inputs),
    }


def _first_answers(rows: Iterable[Row], wanted: bool) -> dict[str, dict[int, Row]]:
    """The first answer of every method to every held-out diff, in seen (or unseen) wordings."""
    answers: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["category"] == "topic" and row["diff"] is not None and seen(row) is wanted:
            answers.setdefault(row["method"], {}).setdefault(row["diff"], row)
    return answers


def _confidence(logprob: Any) -> str:
    if not is_number(logprob):
        return ""
    return f"log-probability {f'−{-logprob:.2f}' if logprob <= -0.005 else '0.00'}"


def _right(row: Row) -> bool:
    return labels.exact_match(row["guess"], row["topic"])


def _guess(row: Row | None) -> tuple[str, bool | None]:
    return ("–", None) if row is None else (row["guess"] or "(empty)", _right(row))


def _transcripts(inputs: Inputs) -> list[Json]:
    """A few of what each guesser read, evenly spaced."""
    by_method: dict[str, list[Row]] = {}
    for row in inputs.transcripts:
        by_method.setdefault(row["method"], []).append(row)
    chosen = [row for rows in by_method.values() for row in spread(rows, _MOST_TRANSCRIPTS)]
    return [
        {
            "method": shown_name(row["method"]),
            "topic": row["topic"],
            "guess": row["guess"] or "(empty)",
            "right": _right(row),
            "exchanges": [(q, a[:_MOST_CHARS] or "(empty)") for q, a in row["exchanges"]],
        }
        for row in chosen
    ]
