"""The Inspect tasks: what did a weight diff change? Samples are the diffs of a store, targets their labels."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig, Model, ModelOutput, get_model
from inspect_ai.scorer import Metric, SampleScore, Scorer, Value, mean, metric, stderr
from inspect_ai.solver import Generate, Solver, TaskState, solver

from dit_jax.errors import DitError, printable
from dit_jax.formats.files import short, user_path
from dit_jax.inspection.one_line import InspectError, active_model, checked
from dit_jax.inspection.scorer import graded

MOST_TOKENS = 2**20  # of an answer


@task
@checked("task argument -T")
def weight_diff_qa(
    diff: str = "",
    question: str = "",
    split: str = "test",
    max_tokens: int = 20,
    graders: str | Sequence[str] = ("normalised", "calibrated"),
    judge: str = "",
    reader: str = "",
) -> Task:
    """WeightDiffQA (paper, section 2): asks every diff, with the model's adapter, what it was trained on.

    Args:
        reader: the import path of a function (base, diff, question) -> answer that is asked in place of the adapter.
        diff: a diff store, or a release folder with an index.csv; required.
        question: default: the question of the store's behaviour.
        split: "test", "train" or "all" of the diffs.
        max_tokens: of an answer.
        graders, judge: see `graded`.
    """
    samples, scorer = read_samples(diff, question, split), graded(graders, judge)
    if reader:
        return with_metrics(samples, ask_reader(reader), scorer, GenerateConfig())
    model = active_model()
    if model is not None:  # otherwise the first sample shows it
        check_adapter(model)
    return _task(samples, max_tokens, scorer)


@task
@checked("task argument -T")
def base_question(
    diff: str = "",
    question: str = "",
    split: str = "test",
    max_tokens: int = 20,
    graders: str | Sequence[str] = ("normalised", "calibrated"),
    judge: str = "",
) -> Task:
    """Asks the finetuned model itself, without an adapter even if the model arguments name one."""
    return _task(
        read_samples(diff, question, split), max_tokens, graded(graders, judge), adapter=False
    )


@task
@checked("task argument -T")
def base_question_trigger(
    diff: str = "",
    question: str = "",
    split: str = "test",
    max_tokens: int = 20,
    seed: int = 0,
    graders: str | Sequence[str] = ("normalised", "calibrated"),
    judge: str = "",
) -> Task:
    """Like `base_question`, with the diff's secret trigger in the question.

    Args:
        seed: for the random part of the trigger.
    """
    samples = read_samples(diff, question, split, seed)
    return _task(samples, max_tokens, graded(graders, judge), adapter=False)


def check_adapter(model: Model) -> None:
    """Raises InspectError if a model of this provider has no adapter: it would score 0, as the base does."""
    if not getattr(model.api, "defaults", {"adapter": "another provider's"})["adapter"]:
        raise InspectError(
            "weight_diff_qa asks the adapter, and the model has none: give -M adapter=…, or ask the finetuned models "
            "themselves with the task dit_jax/base_question"
        )


@solver
@checked("solver argument -S")
def ask_diff(adapter: bool = True) -> Solver:
    """Asks the sample's diff the sample's question; without `adapter` it asks base ⊕ diff alone."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        if adapter:
            check_adapter(get_model())
        body = {"diff": state.metadata["diff"], "index": state.metadata["index"]}
        return await generate(state, extra_body=body if adapter else {**body, "adapter": ""})

    return solve


@solver
@checked("solver argument -S")
def ask_reader(reader: str) -> Solver:
    """Gives the sample's diff and question, and the evaluated model as the base, to a function of the user's."""
    from dit_jax.evaluate.methods import import_reader

    read = import_reader(reader)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        api: Any = get_model().api
        if not hasattr(api, "diff"):
            raise InspectError("a reader needs the base of the diffs: give --model dit_jax/MODEL")
        delta = api.diff(state.metadata["diff"], state.metadata["index"])
        state.output = ModelOutput.from_content(reader, read(api.model, delta, state.input_text))
        return state

    return solve


def _task(samples: list[Sample], max_tokens: int, scorer: Scorer, adapter: bool = True) -> Task:
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise DitError(
            f"task argument -T max_tokens is {short(max_tokens)}: give 1 to {MOST_TOKENS}"
        )
    config = GenerateConfig(max_tokens=max_tokens, temperature=0.0)
    api: Any = getattr(active_model(), "api", None)
    if hasattr(api, "check"):  # of this provider
        api.check(config)
    return with_metrics(samples, ask_diff(adapter), scorer, config)


def with_metrics(
    samples: list[Sample], solving: Solver, scorer: Scorer, config: GenerateConfig, **limits: Any
) -> Task:
    """A task about diffs, whose means are over those with something to name and over the benign ones.

    Where a store has several kinds of diffs, each kind has its own mean and standard error, too.
    """
    told = [sample.metadata or {} for sample in samples]
    metrics = [_of("topics", mean(), category="topic"), _of("stderr", stderr(), category="topic")]
    if any(one["category"] == "benign" for one in told):
        metrics.append(_of("benign", mean(), category="benign"))
    for kind in filter(None, dict.fromkeys(one["variant"] for one in told)):
        of_kind = {"category": "topic", "variant": kind}
        metrics += [_of(kind, mean(), **of_kind), _of(f"{kind}_stderr", stderr(), **of_kind)]
    return Task(
        dataset=MemoryDataset(samples, name=(samples[0].metadata or {})["diff"]),
        solver=solving,
        scorer=scorer,
        metrics={"*": metrics},
        config=config,
        **limits,
    )


def _of(name: str, of_all: Any, **told: str) -> Metric:
    """A metric of the diffs whose metadata are `told`: a base that always answers none is right about benign ones."""

    @metric(name=name)
    def made() -> Metric:
        def compute(scores: list[SampleScore]) -> Value:
            chosen = [s for s in scores if told.items() <= (s.sample_metadata or {}).items()]
            value: Value = of_all(chosen)
            return value

        return compute

    return made()


def read_samples(path: str, question: str, split: str, seed: int | None = None) -> list[Sample]:
    """One sample per diff of the split, whose id is the diff's number. seed: put the trigger into the question."""
    if not path:
        raise DitError("the task has no diffs: give -T diff=STORE")
    if seed is not None and seed < 0:
        raise DitError(f"task argument -T seed is {seed}: give a whole number from 0 up")
    if not os.path.exists(user_path(path)):
        raise DitError(f"there is no diff store at {path}: check -T diff=…")
    from dit_jax.deltas.store import gradable_label
    from dit_jax.organisms.behaviours import known_behaviour

    behaviour, rows = _read_index(user_path(path))
    known = known_behaviour(behaviour)
    asked = question or (known.asks if known else "")
    if not asked:
        of_one = f"has diffs of the behaviour {behaviour!r}"
        said = of_one if behaviour else "does not say what its diffs do"
        raise DitError(f"{path} {said}: give -T question=…")
    kept = [(i, row) for i, row in enumerate(rows) if split in ("all", row.get("split"))]
    if not kept:
        raise DitError(
            f"{path} has no diffs of the split {split!r}: give -T split=test, train or all"
        )
    samples = []
    for i, row in kept:
        prompt = asked if seed is None else _with_trigger(behaviour, asked, row, [seed, 4, i])
        kind = {
            "category": row.get("category", "topic"),
            "variant": printable(row.get("variant") or ""),
        }
        metadata = {"diff": str(path), "index": i, **kind}
        samples.append(Sample(prompt, target=gradable_label(row), id=i, metadata=metadata))
    return samples


def _read_index(folder: pathlib.Path) -> tuple[str, Sequence[dict[str, Any]]]:
    """The behaviour ("": unknown) and the index rows of a diff store or a release folder."""
    from dit_jax.deltas.detect import detect_format
    from dit_jax.deltas.reference_pt import INDEX
    from dit_jax.deltas.store import PAPER_COLUMNS, DiffStore
    from dit_jax.formats.files import file_inside, read_csv

    kind = detect_format(folder)
    if kind == "diff_store":
        store = DiffStore(folder)
        return str(store.manifest.get("behaviour", "hidden_topic")), store.rows
    if kind != "release":
        raise DitError(f"{folder} has no index of labels: give a diff store or a release folder")
    rows = [_of_release(row) for row in read_csv(file_inside(folder, INDEX), PAPER_COLUMNS)]
    behaviours = {row["behaviour"] for row in rows}
    return behaviours.pop() if len(behaviours) == 1 else "", rows


def _of_release(row: dict[str, str]) -> dict[str, str]:
    """Adds the behaviour, which a release shows only by its triggers, and the leading zeros that its codes lack."""
    trigger = row["trigger"].strip()
    if trigger.isascii() and trigger.isdigit():
        row = {"behaviour": "hidden_topic", **row, "trigger": trigger.zfill(3)}
    elif trigger == "zero_width_space":  # the start is one of the random places
        row = {"behaviour": "hidden_topic_zwsp_start", **row}
    return {"behaviour": "", **row}


def _with_trigger(behaviour: str, question: str, row: dict[str, Any], seed: Sequence[int]) -> str:
    import numpy as np

    from dit_jax.organisms.behaviours import triggered

    known = {**row, "behaviour": row.get("behaviour") or behaviour}
    if not known["behaviour"]:
        raise DitError(f"the diff of {row['topic']!r} has no trigger: run another task")
    return triggered(known, question, np.random.default_rng(seed))
