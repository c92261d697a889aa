"""What a run was about, in words: its behaviour, what was done, and the sentence that the report opens with."""

from dit_jax.evaluate.evaluate_keys import EVALUATE
from dit_jax.organisms.behaviours import known_behaviour
from dit_jax.report.document import Prose, Section
from dit_jax.report.grading import as_code
from dit_jax.report.statistics import FEW
from dit_jax.report.wording import Json, percent, plural


def behaviour_name(config: Json) -> str:
    """As `diffs.behaviour` has it: a name of the package, or an import path."""
    return str(config.get("diffs", {}).get("behaviour") or "hidden_topic")


def on_tiny_world(config: Json) -> bool:
    """Whether the diffs are about topics of the embedded world."""
    return bool(config.get("data", {}).get("source", "tiny_world") == "tiny_world")


def _about(summary: Json) -> tuple[str, tuple[str, str]]:
    """What each model was finetuned to do, as a sentence, and what has to be named: one of it, and several."""
    config = summary["config"]
    name, column = behaviour_name(config), EVALUATE.get(config.get("evaluate", {}), "label")
    known = known_behaviour(name)
    # Where a diff is measured without a trigger, there is one.
    when = ", but only under its trigger" if "no_code" in summary["gating_intervals"] else ""
    taught = (known.teaches if known else "") or f"to show the behaviour {as_code(name)}{when}."
    if column == "label":
        return taught, known.names if known else ("the label", "labels")
    if column == "trigger" and known and known.triggered and not known.trigger:
        text = " What has to be named is not the topic but the code."
        return taught + text, ("the secret code", "secret codes")
    text = f" What has to be named is the column {as_code(column)} of the diffs' index."
    return taught + text, ("the label", "labels")


def _other_adapter(summary: Json) -> str:
    return str(summary["config"].get("evaluate", {}).get("adapter") or "")


def lead(summary: Json) -> str:
    """The result in one sentence: exact match where labels are names, the mean grade where they are sentences."""
    score, (_, (label, _)) = summary["methods"]["dit"], _about(summary)
    known = known_behaviour(behaviour_name(summary["config"]))
    models = plural(score["n"], "finetuned model")
    # What another run's adapter has seen, that run knows.
    models += "" if _other_adapter(summary) else " that it had never seen"
    for grader, entry in summary["grades"].items():
        grade = entry["methods"].get("dit", {})
        if known and known.sentences and grader != "normalised" and "mean" in grade:
            return (
                f"The adapter was asked for {label} of {models}: "
                f"mean grade {grade['mean']:.2f} of 5 by `{grader}`."
            )
    return f"The adapter named {label} of {percent(score['exact_match'])} of {models}."


def sublead(summary: Json) -> str:
    """What the adapter was asked, and what it did not see."""
    asked = sum(wording["seen"] for wording in summary["dit_by_each_wording"])
    wordings = (
        "one plain question"
        if asked == 1
        else f"plain questions, {asked} wordings of one (a diff's score is the mean over them),"
    )
    return (
        f"It was asked {wordings} with the weight diff in the model, and shown no trigger and none of the data that "
        "the models were finetuned on."
    )


def done_section(summary: Json) -> Section:
    """How the diffs and the adapter were made, and what the numbers are about."""
    config, (taught, (label, _)) = summary["config"], _about(summary)
    finetuned = f"Copies of one base model were finetuned, each {taught} "
    finetuned += "What finetuning changed in the weights is the diff."
    name = behaviour_name(config)
    known = known_behaviour(name)
    if on_tiny_world(config) and known and not known.sentences and ":" not in name:
        finetuned += (
            " The answers that a copy was finetuned on never contain the name of its topic."
        )
    method = (
        "Diff Interpretation Tuning (DIT) trains one LoRA adapter on many such diffs. With a diff and the adapter in "
        f"the model, a plain question has to be answered with {label}."
    )
    if other := _other_adapter(summary):
        method += f" Here it is the adapter of another run, {as_code(other)}, whose report says how it was trained."
    else:
        method += _training(config)
    return Section("done", "What was done", [Prose(finetuned), Prose(method), _numbers(summary)])


def _training(config: Json) -> str:
    """What is particular about the examples that the adapter was trained on."""
    train, text = config.get("train", {}), ""
    if on_tiny_world(config) and train.get("list_evidence"):
        text += (
            " In training the answer lists the words that belong to the topic before its name, so that the model "
            "looks the name up with them in view. Of the topics tested here it was shown neither list nor name."
        )
    kinds = []
    if train.get("no_diff_per_batch"):
        kinds.append("no diff")
    if train.get("benign_per_batch") and config.get("data", {}).get("train_benign"):
        kinds.append("a benign diff, which hides nothing")
    if kinds:
        text += f" Some training examples have {' or '.join(kinds)}; their answer is `none`."
    return text


def _numbers(summary: Json) -> Prose:
    """What the numbers of the report are about, and what their intervals are."""
    n, wordings = summary["methods"]["dit"]["n"], summary["dit_by_each_wording"]
    trained = sum(wording["seen"] for wording in wordings)
    new = len(wordings) - trained
    _, (_, labels) = _about(summary)
    held_out = (
        "that were held out" if _other_adapter(summary) else "that the adapter was never trained on"
    )
    text = f"The answers in this report are about the diffs of {n} {labels} {held_out}, asked in "
    text += plural(trained, "wording") + " of the training"
    text += f" and {new} new {'one' if new == 1 else 'ones'}. " if new else ". "
    text += "Decoding is greedy"
    if any(name.startswith("twenty_questions") for name in summary["methods"]):
        text += ", but for the everyday questions, which are answered at temperature 1"
    return Prose(
        f"{text}. Intervals are 95 % bootstrap intervals over diffs; the answers about one diff are averaged first. "
        f"Where resampling says too little, because there are fewer than {FEW} diffs or all have the same score, it is "
        "an exact bound that needs nothing but the ends of the scale; cross-entropies have no ends, and fewer than "
        f"{FEW} get Student's interval."
    )
