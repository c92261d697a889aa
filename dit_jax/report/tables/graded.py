"""Graded answers from CSV files: `topic, guessed_topic, score` and what else a run of ours adds.

A file of the paper holds one method about one set of diffs; its folder names the diffs, its name the
method. A `results-graded.csv` of ours holds all methods of a run, and every grader that graded them.
A row without a usable grade is left out and counted by its reason; it is never given a grade.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dit_jax.config.loading import load_saved
from dit_jax.data.sources import open_source
from dit_jax.errors import DitError
from dit_jax.report.results import GRADED_FILE
from dit_jax.report.statistics import cluster_means

LOW, HIGH = 1.0, 5.0
Unit = Hashable  # what counts as one draw of chance: a diff


@dataclasses.dataclass(frozen=True)
class GradedRow:
    """One answer with its grade. unit: the diff that it is about."""

    unit: Unit
    label: str
    guess: str
    score: float


@dataclasses.dataclass(frozen=True)
class Graded:
    """All grades of one method on one set of diffs.

    experiment: folder of a file of the paper, or name of a run. name: file without suffix, or method.
    subject: "topic" or "summary", what the answers name. own: whether it comes from a run of ours, whose
    config is `config`. excluded: how many rows were left out, by reason. folder: what the run's workdir lies in;
    series: its name if several of the runs lie there (a sweep, whose runs are one curve), else the run's.
    """

    experiment: str
    name: str
    file: str
    subject: str
    rows: tuple[GradedRow, ...]
    excluded: Mapping[str, int]
    grader: str = ""
    own: bool = False
    kind: str = "method"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: str = ""
    series: str = ""

    def by_unit(self) -> dict[Unit, float]:
        """Mean grade of each diff."""
        return cluster_means([row.score for row in self.rows], [row.unit for row in self.rows])

    def by_label(self) -> dict[Unit, float]:
        """Mean grade of each label, to pair diffs of different folders that hide the same topic."""
        return cluster_means([row.score for row in self.rows], [row.label for row in self.rows])


def read_grade(text: Any) -> tuple[float | None, str]:
    """(grade, "") or (None, why there is none)."""
    text = str("" if text is None else text).strip()
    if not text:
        return None, "no grade"
    try:
        score = float(text)
    except ValueError:
        return None, "not a number"
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
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DitError(f"there is no folder '{folder}': set --config.results to graded CSV files")
    files = {path.resolve(): (path, False) for path in sorted(root.rglob("*.csv"))}
    for run in runs:
        path = Path(str(run)).expanduser() / "report" / GRADED_FILE
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
    graded = _with_series(graded)
    if not any(item.rows for item in graded):
        reason = f" ({next(iter(skipped.values()))})" if skipped else ""
        raise DitError(
            f"'{folder}' holds no graded answers{reason}: its CSV files need the columns topic, "
            "guessed_topic, score (or summary, guessed_summary, score)"
        )
    return graded, skipped


def _with_series(graded: list[Graded]) -> list[Graded]:
    runs: dict[str, set[str]] = {}
    for item in graded:
        runs.setdefault(item.folder, set()).add(item.experiment)
    return [
        dataclasses.replace(
            item,
            series=Path(item.folder).name if len(runs[item.folder]) > 1 else item.experiment,
        )
        if item.own
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
    subject = subjects[0]
    own = "method" in source.columns
    rows: dict[tuple[str, str], list[GradedRow]] = {}
    excluded: dict[tuple[str, str], Counter[str]] = {}
    kinds: dict[tuple[str, str], str] = {}
    for record in source.read(source.columns):
        values = {key: str(value or "") for key, value in record.values.items()}
        # A row that cannot be read names no method: it is counted under the file's name.
        named = own and not record.problem
        key = (_method(values) if named else path.stem, values.get("grader", ""))
        kept, counts = rows.setdefault(key, []), excluded.setdefault(key, Counter())
        kinds.setdefault(key, values.get("kind", "") or "method")
        if record.problem:
            counts["not a readable row"] += 1
            continue
        label = values[subject].strip()
        score, reason = read_grade(values["score"])
        if not label:
            score, reason = None, "no label"
        if score is None:
            counts[values.get("reason", "")[:80] or reason] += 1
            continue
        unit = values.get("diff", "") or (label, values.get("trigger", ""))
        kept.append(GradedRow(unit, label, values[f"guessed_{subject}"].strip(), score))
    experiment, config, folder = _run_of(path) if own else (path.parent.name, {}, "")
    return [
        Graded(
            experiment,
            key[0],
            name,
            subject,
            tuple(kept),
            dict(excluded[key]),
            grader=key[1],
            own=own and key[0] != path.stem,
            kind=kinds[key],
            config=config,
            folder=folder,
            series=experiment,
        )
        for key, kept in rows.items()
    ]


def _method(values: Mapping[str, str]) -> str:
    """The method; answers to wordings that the adapter did not train on are one of their own."""
    unseen = values.get("wording_seen", "").casefold() == "false"
    return values["method"] + ("_unseen" if unseen else "")


def _run_of(path: Path) -> tuple[str, Mapping[str, Any], str]:
    """Name, config and parent of the run that a `WORKDIR/report/results-graded.csv` belongs to."""
    folder = (path.parent.parent if path.parent.name == "report" else path.parent).resolve()
    config = folder / "config.json"
    loaded = load_saved(config).to_dict() if config.is_file() else {}
    return folder.name, loaded, str(folder.parent)
