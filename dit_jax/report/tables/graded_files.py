"""Graded answers from CSV files: `topic, guessed_topic, score` and what else a run of ours adds.

A file of the paper holds one method about one set of diffs; its folder names the diffs, its name the
method. A `results-graded.csv` of ours holds all methods of a run, and every grader that graded them.
A row without a usable grade is left out and counted by its reason; it is never given a grade.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dit_jax.config.loading import load_saved
from dit_jax.data.sources import open_source
from dit_jax.errors import DitError
from dit_jax.formats.files import user_path
from dit_jax.formats.json_shape import fits, is_count, is_text, maybe, optional
from dit_jax.graders.grades import HIGH, LOW
from dit_jax.report.graded import Graded, GradedRow
from dit_jax.report.results import GRADED_FILE
from dit_jax.report.wording import UNSEEN
from dit_jax.runtime.outgoing import from_cell

# What the tables read of a run's config, which may be a stranger's.
_CONFIG = optional(
    data=optional(train_topics=is_count),
    diffs=optional(parameters=is_text, rank=maybe(is_count)),
    train=optional(max_diffs=is_count),
    evaluate={},
)


def read_grade(text: Any) -> tuple[float | None, str]:
    """(grade, "") or (None, why there is none)."""
    text = str("" if text is None else text).strip()
    if not text:
        return None, "no grade"
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        return None, "not a number"
    return (score, "") if LOW <= score <= HIGH else (None, "outside 1–5")


def read_graded(folder: str, runs: Iterable[str] = ()) -> tuple[list[Graded], dict[str, str]]:
    """All graded answers below `folder`, and those of our own runs.

    Args:
        folder: is searched for CSV files with the columns `X`, `guessed_X` and `score`, at any depth.
        runs: workdirs of runs of ours.

    Returns:
        What was read, in the order of the paths, and the files that hold no grades with the reason.

    Raises:
        DitError: the folder is not there or holds no grades, or a run has no graded answers.
    """
    root = user_path(folder)
    if not root.is_dir():
        raise DitError(f"there is no folder '{folder}': set --config.results to graded CSV files")
    found = (path for path in sorted(root.rglob("*.csv")) if path.is_file())
    files = {path.resolve(): (path, False) for path in found}
    for run in runs:
        path = user_path(str(run)) / "report" / GRADED_FILE
        if not path.is_file():
            raise DitError(f"'{path}' is missing: run the stages of that workdir up to 'report'")
        files[path.resolve()] = (path, True)
    graded: list[Graded] = []
    skipped: dict[str, str] = {}
    for path, asked_for in files.values():
        name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
        try:
            graded += read_file(path, name)
        except DitError as error:
            if asked_for:
                raise
            skipped[name] = str(error)
    if not any(item.rows for item in graded):
        reason = f" ({next(iter(skipped.values()))})" if skipped else ""
        raise DitError(
            f"'{folder}' holds no graded answers{reason}: its CSV files need the columns topic, "
            "guessed_topic, score (or summary, guessed_summary, score)"
        )
    return _with_series(graded), skipped


def _with_series(graded: list[Graded]) -> list[Graded]:
    """Runs of ours in one folder, as a sweep leaves them, get its name as their series."""
    runs: dict[str, set[str]] = {}
    for item in graded:
        runs.setdefault(item.folder, set()).add(item.experiment)
    return [
        dataclasses.replace(item, series=Path(item.folder).name)
        if item.own and len(runs[item.folder]) > 1
        else item
        for item in graded
    ]


def read_file(path: Path, name: str) -> list[Graded]:
    """The graded answers of a file by method and grader. Raises DitError, saying why it holds none."""
    (source,) = open_source(str(path))
    subjects = [column for column in source.columns if f"guessed_{column}" in source.columns]
    if not subjects:
        raise DitError("no columns 'X' and 'guessed_X'")
    if "score" not in source.columns:
        raise DitError("no column 'score': it is not graded")
    subject, own = subjects[0], "method" in source.columns
    found: dict[tuple[str, str], tuple[list[GradedRow], Counter[str]]] = {}
    for record in source.read(source.columns):
        values = {key: str(value or "") for key, value in record.values.items()}
        if own:  # the paper's files are as they are
            values = {key: from_cell(value) for key, value in values.items()}
        # A row that cannot be read names no method: it is counted under the file's name.
        method = _method(values) if own and not record.problem else path.stem
        rows, counts = found.setdefault((method, values.get("grader", "")), ([], Counter()))
        if record.problem:
            counts["not a readable row"] += 1
            continue
        label, (score, reason) = values[subject].strip(), read_grade(values["score"])
        if score is None or not label:
            counts[values.get("reason", "")[:80] or (reason if label else "no label")] += 1
            continue
        unit = values.get("diff", "") or (label, values.get("trigger", ""))
        rows.append(GradedRow(unit, label, values[f"guessed_{subject}"].strip(), score))
    experiment, config, folder = _run_of(path) if own else (path.parent.name, {}, "")
    return [
        Graded(
            experiment, method, name, subject, tuple(rows), dict(counts), grader,
            own=own and method != path.stem, config=config, folder=folder, series=experiment,
        )
        for (method, grader), (rows, counts) in found.items()
    ]  # fmt: skip


def _method(values: Mapping[str, str]) -> str:
    """The method; answers to wordings that the adapter did not train on are one of their own."""
    unseen = values.get("wording_seen", "").casefold() == "false"
    return values["method"] + (UNSEEN if unseen else "")


def _run_of(path: Path) -> tuple[str, Mapping[str, Any], str]:
    """Name, config and parent of the run that a `WORKDIR/report/results-graded.csv` belongs to."""
    folder = (path.parent.parent if path.parent.name == "report" else path.parent).resolve()
    config = folder / "config.json"
    loaded = load_saved(config).to_dict() if config.is_file() else {}
    if not fits(loaded, _CONFIG):
        raise DitError(f"'{config}' is not the config of a run: use another folder")
    return folder.name, loaded, str(folder.parent)
