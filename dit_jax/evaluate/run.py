"""The stage `evaluate`: methods, controls and untrained baselines on diffs that no training saw."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import artifacts, processes
from dit_jax.api import Model, check_base, load_adapter
from dit_jax.data.organisms import answer_text
from dit_jax.deltas.store import DiffStore
from dit_jax.errors import DitError
from dit_jax.evaluate import baselines, methods
from dit_jax.organisms.gate import CONDITIONS
from dit_jax.progress import Progress


def evaluate_run(model: Model, workdir: pathlib.Path, config: Any, seed: int) -> dict[str, Any]:
    """Writes WORKDIR/evaluate/: answers.jsonl, label_cross_entropy.json, gating.json, curves.json.

    Args:
        config: the `evaluate` section of the config.

    Returns:
        Facts for the record of the stage: {"answers": n}.
    """
    # ---------------------------------------------------------------- inputs
    store = DiffStore(workdir / "diffs")
    check_base(store.manifest.get("base"), model, str(workdir / "diffs"))
    adapter = load_adapter(workdir / "adapter", model)
    topics = methods.read_held_out(store, "topic")
    benign = methods.read_held_out(store, "benign")
    if len(topics) < 2:
        raise DitError(
            "evaluation needs two held-out topics or more (each is another's shuffled control): "
            "raise data.test_topics and use a new --workdir"
        )
    seen, unseen = list(config.seen_questions), list(config.unseen_questions)
    if not seen:
        raise DitError("config key 'evaluate.seen_questions' is empty: give at least one question")
    question = seen[0]
    off = jax.tree.map(jnp.zeros_like, adapter)

    # ---------------------------------------------------------------- answers
    rows: list[dict[str, Any]] = []
    ask: dict[str, Any] = {"evaluate": config}
    topic = {**ask, "category": "topic"}
    noise = methods.noise(topics.stacked, seed)
    wrong = methods.shuffled(topics.stacked)
    nothing = methods.zeros(topics.stacked)
    with Progress("evaluate", 11) as progress:
        for questions, known in ((seen, True), (unseen, False)):
            dit = {**ask, "method": "dit", "kind": "method", "seen": known, "adapter": adapter}
            rows += methods.answer_rows(model, topics, questions, category="topic", **dit)
            if len(benign):
                rows += methods.answer_rows(model, benign, questions, category="benign", **dit)
            rows += methods.no_diff_rows(
                model, topics, questions, seen=known, adapter=adapter, evaluate=config
            )
            progress.advance()
        plain = {**topic, "kind": "method", "seen": True, "adapter": off}
        rows += methods.answer_rows(model, topics, [question], method="base_question", **plain)
        rows += methods.answer_rows(
            model, topics, [question], method="base_question_trigger", trigger_seed=seed, **plain
        )
        progress.advance(2)
        control = {**topic, "kind": "control", "seen": True}
        for name, stacked in (
            ("no_diff", nothing),
            ("shuffled_diff", wrong),
            ("noise_diff", noise),
        ):
            rows += methods.answer_rows(
                model, topics, [question], method=name, stacked=stacked, adapter=adapter, **control
            )
            progress.advance()
        rows += methods.answer_rows(
            model, topics, seen[-1:], method="adapter_off", adapter=off, **control
        )
        progress.advance()

        # ------------------------------------------------------------ untrained baselines
        names = sorted({row["topic"] for row in store.rows if row["category"] == "topic"})
        table = {row["topic"]: row["keywords"] for row in store.rows if row["category"] == "topic"}
        attributes = [[word for word in table[name] if word != name] for name in names]
        spelled = [[name] for name in names]
        prompts = [question, *config.logit_prompts]
        scores = {
            "name_reading": baselines.weight_reading(model, topics.stacked, spelled),
            "attribute_oracle": baselines.weight_reading(model, topics.stacked, attributes),
            "logit_difference": baselines.logit_difference(model, topics.stacked, spelled, prompts),
        }
        for name, values in scores.items():
            rows += _ranking_rows(model, name, values, names, topics)
        progress.advance(2)

        # ------------------------------------------------------------ cross-entropy of the labels
        targets = [
            answer_text(row["topic"], row["evidence"] if config.list_evidence else [])
            for row in topics.rows
        ]
        cross_entropy = {
            name: baselines.label_cross_entropy(model, adapter, stacked, question, targets)
            for name, stacked in (
                ("matched", topics.stacked),
                ("shuffled", wrong),
                ("noise", noise),
                ("none", nothing),
            )
        }
        progress.advance(2)

    # ---------------------------------------------------------------- write
    processes.on_main(lambda: _write(workdir, store, rows, cross_entropy))
    return {"answers": len(rows)}


def _write(
    workdir: pathlib.Path,
    store: DiffStore,
    rows: list[dict[str, Any]],
    cross_entropy: dict[str, list[float]],
) -> None:
    folder = artifacts.make_dir(workdir / "evaluate")
    artifacts.write_text(folder / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    artifacts.write_json(folder / "label_cross_entropy.json", cross_entropy)
    gated = [row for row in store.rows if row["category"] == "topic"]
    artifacts.write_json(
        folder / "gating.json", {name: [float(row[name]) for row in gated] for name in CONDITIONS}
    )
    stages = {name: artifacts.stage_done(workdir, name) or {} for name in ("diffs", "train")}
    artifacts.write_json(
        folder / "curves.json",
        {
            "diff_loss": stages["diffs"].get("loss_curve", []),
            "adapter_loss": stages["train"].get("loss_curve", []),
        },
    )


def _ranking_rows(
    model: Model, method: str, scores: np.ndarray, names: list[str], topics: methods.HeldOut
) -> list[dict[str, Any]]:
    rows = []
    for index, row, values in zip(topics.indices, topics.rows, scores, strict=True):
        guess = names[int(values.argmax())]
        rows.append(
            {
                "method": method,
                "kind": "baseline",
                "diff": index,
                "topic": row["topic"],
                "category": "topic",
                "name_tokens": len(model.chat.text_ids(row["topic"])),
                "wording": "",
                "wording_seen": True,
                "question": "",
                "answer": guess,
                "guess": guess,
                "logprob": None,
            }
        )
    return rows
