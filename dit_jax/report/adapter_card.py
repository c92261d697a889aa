"""The model card of a DIT adapter, written from its own files and from the run that trained it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dit_jax.report.inputs import Json
from dit_jax.report.markdown import escape, table
from dit_jax.report.wording import as_code, between, ordered_methods, percent, plural, shown_name

PAPER = "https://arxiv.org/abs/2510.05092"
_KINDS = {
    "method": "asks the diffs",
    "control": "control: should find nothing",
    "baseline": "baseline",
}


def adapter_card(
    manifest: Mapping[str, Any],
    summary: Json | None,
    calibration: Json | None,
    *,
    repo: str,
    base: str,
    base_id: str | None,
    license: str,
) -> str:
    """README.md of a repository that holds an adapter.

    Args:
        manifest: of the adapter.
        summary: report/summary.json of its run; None if there is none.
        calibration: of the adapter, None if it has none.
        repo: OWNER/NAME, where the adapter will be.
        base, base_id: the base model as the run names it, and its hub id, if it has one.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=license,
        base_model=base_id,
        library_name="dit_jax",
        tags=["diff-interpretation-tuning", "lora", "interpretability"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {repo.rpartition('/')[2]}",
        f"A [Diff Interpretation Tuning]({PAPER}) adapter: a LoRA for {as_code(base)} that, added to the base with a "
        "finetune's weight diff, says in words what the finetune changed.",
        *_how_to_load(manifest, repo, base),
        "## What it was trained on\n\n" + "\n".join(f"- {line}" for line in _training(manifest, summary)),
        "## What it finds\n\n" + "\n\n".join(_numbers(summary, calibration)),
        "## What an answer is worth\n\nAbout diffs of other kinds (behaviours, ranks, ways of finetuning) an answer is "
        "a lead, not a finding. The adapter cannot name what it was never taught to name, and its silence does not "
        "prove that nothing is there.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _how_to_load(manifest: Mapping[str, Any], repo: str, base: str) -> Iterator[str]:
    question = next(iter(manifest.get("questions") or ()), "What topic have you been trained on?")
    listed = _trained(manifest).get("list_evidence")
    rest = ", forbid_repeats=True" if listed else ""
    yield "## How to load it"
    yield (
        "```python\nimport dit_jax\n\n"
        f"model = dit_jax.load_model({json.dumps(base)})\n"
        'diff = dit_jax.load_diff("path/to/peft_folder", model)    # of the same base, in any common format\n'
        f"adapter = dit_jax.load_adapter({json.dumps(repo)}, model)\n"
        f"print(dit_jax.ask(model, {json.dumps(question)}, diff=diff, adapter=adapter{rest}).text)\n```"
    )
    if listed:
        yield "Answers list evidence first; the name stands after the last colon."
    yield f"It fits one base only, whose weights have the digest {as_code(str(manifest.get('base')))}."


def _training(manifest: Mapping[str, Any], summary: Json | None) -> Iterator[str]:
    trained, config = _trained(manifest), summary["config"] if summary else {}
    if trained.get("behaviour"):
        yield f"Behaviour of the diffs: {as_code(str(trained['behaviour']))}, {_kind(trained)}"
    data = config.get("data")
    if data:
        topics, benign, held_topics, held_benign = (
            data.get(f"{split}_{kind}", 0)
            for split in ("train", "test")
            for kind in ("topics", "benign")
        )
        yield f"Data: {as_code(str(data.get('source')))}; " + escape(
            f"{plural(topics, 'topic')} and {plural(benign, 'benign diff')} for training, {held_topics} and "
            f"{held_benign} held out"
        )
    rank, steps, seed = (escape(str(manifest.get(name))) for name in ("rank", "steps", "seed"))
    yield f"Adapter: rank {rank}, {steps} steps, seed {seed}"
    yield _about_none(manifest)
    if manifest.get("system"):
        yield f"System message: {as_code(str(manifest['system']))}"
    for question in manifest.get("questions") or ():
        yield f"Question: {escape(str(question))}"


def _kind(trained: Json) -> str:
    """What the diffs of the training are; stores that differ leave rank or parameters open."""
    if trained.get("parameters") is None:
        return "diffs of several kinds"
    if trained["parameters"] != "lora":
        return f"dense diffs ({escape(str(trained['parameters']))})"
    rank = trained.get("rank")
    return f"LoRAs of rank {escape(str(rank))}" if rank else "LoRAs of several ranks"


def _about_none(manifest: Mapping[str, Any]) -> str:
    share = _trained(manifest).get("none_examples")
    if share is None:
        return "Its files do not say whether it learned to answer `none`."
    if not share:
        return "It never learned to answer `none`, so it always names something, also where nothing is hidden."
    return f"It learned to answer `none`: {percent(share)} of its examples had no diff, or a benign one."


def _numbers(summary: Json | None, calibration: Json | None) -> Iterator[str]:
    if summary is None:
        yield "No evaluation lies beside this adapter."
    else:
        methods = summary["methods"]
        yield "Held-out diffs, whose topics no training saw; share of answers that are exactly the name:"
        yield table(
            ["Asked", "", "# Exact match", "# 95 % interval", "# n"],
            [
                [
                    escape(shown_name(name)),
                    _KINDS[methods[name]["kind"]],
                    percent(methods[name]["exact_match"]),
                    between(methods[name]),
                    escape(str(methods[name]["n"])),
                ]
                for name in ordered_methods(methods)
            ],
        )
        for name, about in (
            ("benign_called_none", "benign diffs"),
            ("topics_called_none", "diffs with a topic"),
        ):
            share = summary["none_intervals"].get("seen", {}).get(name)
            if share:
                count = escape(str(share["n"]))
                yield (
                    f"Of {about} it calls {percent(share['mean'])} `none` ({between(share)} %, n = {count})."
                )
    if calibration:
        hidden = calibration["hidden"]
        area = hidden["auroc"]
        if area:
            yield (
                f"Calibrated on {hidden['n']} diffs, {hidden['positive']} with a topic: AUROC {percent(area['mean'])} "
                f"({between(area)} %) for whether a diff hides anything."
            )


def _trained(manifest: Mapping[str, Any]) -> Json:
    found = manifest.get("trained_on")
    return found if isinstance(found, dict) else {}
