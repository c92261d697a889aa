"""The Inspect tasks: what did this weight diff change? Samples are the diffs of a store, targets its labels."""

import pathlib
from collections.abc import Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, Model, get_model
from inspect_ai.scorer import Metric, SampleScore, Value, mean, metric, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from dit_jax.errors import DitError
from dit_jax.inspection.one_line import InspectError, active_model, one_line
from dit_jax.inspection.scorer import graded


@task
@one_line
def weight_diff_qa(
    diff: str = "",
    question: str = "",
    split: str = "test",
    max_tokens: int = 20,
    graders: str | Sequence[str] = ("normalised", "calibrated"),
    judge: str = "",
) -> Task:
    """WeightDiffQA (paper, section 2): every diff, with the adapter of the model, is asked what it was trained on.

    Args:
        diff: a diff store, or a release folder with an index.csv; needed.
        question: default: the one of the store's behaviour.
        split: "test", "train" or "all" of its diffs.
        max_tokens: longest answer.
        graders, judge: see `graded`.
    """
    model = active_model()
    if model is not None:  # otherwise the first sample tells
        check_adapter(model)
    return _task(diff, question, split, max_tokens, graders, judge, adapter=True)


@task
@one_line
def base_question(
    diff: str = "",
    question: str = "",
    split: str = "test",
    max_tokens: int = 20,
    graders: str | Sequence[str] = ("normalised", "calibrated"),
    judge: str = "",
) -> Task:
    """The finetuned model is asked itself, without an adapter, whatever the model arguments say."""
    return _task(diff, question, split, max_tokens, graders, judge, adapter=False)


@task
@one_line
def base_question_trigger(
    diff: str = "",
    question: str = "",
    split: str = "test",
    max_tokens: int = 20,
    seed: int = 0,
    graders: str | Sequence[str] = ("normalised", "calibrated"),
    judge: str = "",
) -> Task:
    """The same with the diff's secret trigger in the question.

    Args:
        seed: of what in the trigger is left to chance.
    """
    return _task(
        diff, question, split, max_tokens, graders, judge, adapter=False, trigger_seed=seed
    )


def check_adapter(model: Model) -> None:
    """Raises InspectError for a model of this provider that has no adapter: it would score 0, as the base does."""
    if not getattr(model.api, "defaults", {"adapter": "another provider's"})["adapter"]:
        raise InspectError(
            "weight_diff_qa asks the adapter, and the model has none: give -M adapter=…, or ask the finetuned models "
            "themselves with the task dit_jax/base_question"
        )


@solver
def ask_diff(adapter: bool = True) -> Solver:
    """Puts the sample's question to the sample's diff; without `adapter`, to base ⊕ diff alone."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if adapter:
            check_adapter(get_model())
        body = {"diff": state.metadata["diff"], "index": state.metadata["index"]}
        return await generate(state, extra_body=body if adapter else {**body, "adapter": ""})

    return solve


def _task(
    diff: str,
    question: str,
    split: str,
    max_tokens: int,
    graders: str | Sequence[str],
    judge: str,
    *,
    adapter: bool,
    trigger_seed: int | None = None,
) -> Task:
    samples = _samples(diff, question, split, trigger_seed)
    metrics = [_of("topic", "topics", mean()), _of("topic", "stderr", stderr())]
    if any((sample.metadata or {})["category"] == "benign" for sample in samples):
        metrics.append(_of("benign", "benign", mean()))
    return Task(
        dataset=MemoryDataset(samples, name=str(diff)),
        solver=ask_diff(adapter),
        scorer=graded(graders, judge),
        metrics={"*": metrics},
        config=GenerateConfig(max_tokens=max_tokens, temperature=0.0),
    )


def _of(category: str, name: str, of_all: Any) -> Metric:
    """A metric of the diffs of one category: a base that says none to everything is right about all benign ones."""

    @metric(name=name)
    def made() -> Metric:
        def compute(scores: list[SampleScore]) -> Value:
            chosen = [s for s in scores if (s.sample_metadata or {})["category"] == category]
            value: Value = of_all(chosen)
            return value

        return compute

    return made()


def _samples(path: str, question: str, split: str, trigger_seed: int | None) -> list[Sample]:
    """One sample per diff of the split; its id is the diff's place in the store."""
    if not path:
        raise DitError("the task has no diffs: give -T diff=STORE")
    # Inspect reads a value as YAML: [no] is a list.
    if not isinstance(path, str) or not pathlib.Path(path).expanduser().exists():
        raise DitError(f"there is no diff store at {path}: check -T diff=…")
    from dit_jax.deltas.store import label_of
    from dit_jax.organisms.behaviours import known_behaviour

    behaviour, rows = _read_index(pathlib.Path(path).expanduser())
    known = known_behaviour(behaviour)
    asked = question or (known.asks if known else "")
    if not asked:
        said = (
            f"has diffs of the behaviour {behaviour!r}"
            if behaviour
            else "does not say what its diffs do"
        )
        raise DitError(f"{path} {said}: give -T question=…")
    kept = [(i, row) for i, row in enumerate(rows) if split in ("all", row.get("split"))]
    if not kept:
        raise DitError(
            f"{path} has no diffs of the split {split!r}: give -T split=test, train or all"
        )
    samples = []
    for i, row in kept:
        prompt = asked
        if trigger_seed is not None:
            prompt = _with_trigger(behaviour, asked, row, [trigger_seed, 4, i])
        metadata = {"diff": str(path), "index": i, "category": row.get("category", "topic")}
        samples.append(Sample(prompt, target=label_of(row), id=i, metadata=metadata))
    return samples


def _read_index(folder: pathlib.Path) -> tuple[str, Sequence[dict[str, Any]]]:
    """The behaviour ("": nothing says it) and the index rows of a diff store or a release folder."""
    from dit_jax.deltas.detect import detect_format
    from dit_jax.deltas.reference_pt import INDEX, INDEX_COLUMNS
    from dit_jax.deltas.store import DiffStore
    from dit_jax.formats.files import file_inside, read_csv

    kind = detect_format(folder)
    if kind == "diff_store":
        store = DiffStore(folder)
        return str(store.manifest.get("behaviour", "hidden_topic")), store.rows
    if kind != "release":
        raise DitError(f"{folder} has no index of labels: give a diff store or a release folder")
    rows = [_of_release(row) for row in read_csv(file_inside(folder, INDEX), INDEX_COLUMNS)]
    behaviours = {row["behaviour"] for row in rows}
    return behaviours.pop() if len(behaviours) == 1 else "", rows


def _of_release(row: dict[str, str]) -> dict[str, str]:
    """A release names no behaviour, but its triggers tell it; and its codes are numbers, without leading zeros."""
    trigger = row["trigger"].strip()
    if trigger.isascii() and trigger.isdigit():
        row = {"behaviour": "hidden_topic", **row, "trigger": trigger.zfill(3)}
    elif trigger == "zero_width_space":  # a start is one of the random places
        row = {"behaviour": "hidden_topic_zwsp_start", **row}
    return {"behaviour": "", **row}


def _with_trigger(behaviour: str, question: str, row: dict[str, Any], seed: Sequence[int]) -> str:
    import numpy as np

    from dit_jax.organisms.behaviours import triggered

    known = {**row, "behaviour": row.get("behaviour") or behaviour}
    if not known["behaviour"]:
        raise DitError(f"the diff of {row['topic']!r} has no trigger: run another task")
    return triggered(known, question, np.random.default_rng(seed))
