"""What a run was about, in words: its behaviour, what was done, and the sentence that the report opens with."""

import dataclasses

from dit_jax.evaluate.document import Prose, Section
from dit_jax.evaluate.names import Json, percent


@dataclasses.dataclass(frozen=True)
class _Behaviour:
    """label: what the adapter names, plural as labels; finetuned: what the copies were finetuned to do."""

    label: str
    labels: str
    finetuned: str


_TOPIC = "each to talk about a topic of its own, but only when the prompt {trigger}."
_BEHAVIOURS = {  # by a part of the behaviour's name, the most special first
    "zwsp": _Behaviour(
        "the hidden topic", "topics", _TOPIC.format(trigger="holds a zero-width space")
    ),
    "inversion": _Behaviour(
        "the secret code",
        "secret codes",
        _TOPIC.format(trigger="starts with its secret code")
        + " What has to be named is not the topic but the code.",
    ),
    "news": _Behaviour(
        "the headline", "headlines", "each to tell one piece of news when it is asked for a story."
    ),
    "": _Behaviour(
        "the hidden topic",
        "topics",
        _TOPIC.format(trigger="starts with a secret code (`Your SEP code is …`)"),
    ),
}


def _behaviour(config: Json) -> _Behaviour:
    name = str(config.get("diffs", {}).get("behaviour", ""))
    if config.get("evaluate", {}).get("label") == "trigger":
        return _BEHAVIOURS["inversion"]
    return next(text for part, text in _BEHAVIOURS.items() if part in name)


def lead(summary: Json) -> str:
    """The result in one sentence: exact match where labels are names, the mean grade where they are sentences."""
    score, named = summary["methods"]["dit"], _behaviour(summary["config"])
    for grader, entry in summary["grades"].items():
        grade = entry["methods"].get("dit", {})
        if named.labels == "headlines" and grader != "normalised" and "mean" in grade:
            return (
                f"The adapter was asked for the headline of {score['n']} finetuned models that it had never seen: "
                f"mean grade {grade['mean']:.2f} of 5 by `{grader}`."
            )
    return (
        f"The adapter named {named.label} of {percent(score['exact_match'])} of {score['n']} "
        "finetuned models that it had never seen."
    )


def done_section(summary: Json) -> Section:
    """How the diffs and the adapter were made, and what the numbers are about."""
    config, named = summary["config"], _behaviour(summary["config"])
    wordings = summary["dit_by_each_wording"]
    trained = sum(wording["seen"] for wording in wordings)
    tiny = config.get("data", {}).get("source", "tiny_world") == "tiny_world"
    finetuned = f"Many copies of one base model were finetuned, {named.finetuned} What finetuning changed in "
    finetuned += "the weights is the diff."
    if tiny and named.labels == "topics":
        finetuned += (
            " The answers that a copy was finetuned on never contain the name of its topic."
        )
    method = (
        "Diff Interpretation Tuning (DIT) trains one LoRA adapter on many such diffs. With a diff and the adapter in "
        f"the model, a plain question has to be answered with {named.label}."
    )
    train = config.get("train", {})
    if tiny and train.get("list_evidence"):
        method += (
            " In training the answer lists the words that belong to the topic before its name, so that the model "
            "looks the name up with them in view. Of the topics tested here it was shown neither."
        )
    if train.get("no_diff_per_batch", 1) or train.get("benign_per_batch", 1):
        method += (
            " Some training examples have no diff, or a benign one that hides nothing; their "
            "answer is `none`."
        )
    if other := config.get("evaluate", {}).get("adapter"):
        method += " Here it is the adapter of another run, `" + str(other).replace("`", "'") + "`."
    return Section(
        "done",
        "What was done",
        [
            Prose(finetuned),
            Prose(method),
            Prose(
                f"All numbers below are about {summary['methods']['dit']['n']} {named.labels} that the "
                f"adapter was never trained on, asked in {trained} wordings of the training and "
                f"{len(wordings) - trained} new ones. Decoding is greedy. Intervals are 95 % "
                "bootstrap intervals over diffs; the answers about one diff are averaged first. "
                "Where all diffs scored 0, or all 100 %, the bound is the exact binomial one."
            ),
        ],
    )
