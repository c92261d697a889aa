"""Sweeps: `python -m dit_jax.sweep --sweep configs/sweeps/data_scaling.py --workdir runs/data_scaling`.

A sweep file is a Python file with

    CONFIG = "configs/quickstart.py"      # the config that all runs change, with its :ARGUMENT if it has one
    SWEPT = "train.max_diffs"             # the key whose values the table and the plot stand over
    METRIC = "methods.dit.exact_match"    # a number in every run's report/summary.json
    TABLE = "data_scaling"                # optional: name of the table's files, default "sweep"
    ALSO = {"called none": "none.topics_called_none"}   # optional: other numbers of the summaries, for the table
    def get_sweep(arg=None):              # yields (name, overrides) of every run
        yield "diffs_4", {"train.max_diffs": 4}

It is code and runs with your rights: load only files that you trust. To run another config, yield (name, overrides,
config); `{arg}` in a config stands for the sweep's argument. Each run has the folder WORKDIR/NAME. Runs with the same
diffs share them. `--config.key=value` changes all runs.
"""

import os
import pathlib
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dit_jax.cli import run_stages as main
from dit_jax.cli.config_checks import check_config
from dit_jax.cli.flags import Parser
from dit_jax.cli.stages import chosen_stages, free_keys, optional_keys
from dit_jax.cli.workdir import (
    CONFIG_FILE,
    LATER_SECTIONS,
    check_workdir,
    given_folder,
    saved_config,
)
from dit_jax.config.loading import (
    config_diff,
    flatten,
    load_config,
    split_flags,
)
from dit_jax.config.user_code import ProgramFile
from dit_jax.errors import DitError, first_line
from dit_jax.report import sweep_table
from dit_jax.runtime import artifacts, stage_records, startup
from dit_jax.runtime.exits import explained, status_of
from dit_jax.runtime.outgoing import show

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=+-]{0,99}")


class Run(NamedTuple):
    """One run of a sweep: its name, its overrides as `key=value`, the config that they give, and its file."""

    name: str
    overrides: list[str]
    config: ConfigDict
    file: str


class Sweep(NamedTuple):
    """A sweep file, read and checked."""

    swept: str
    metric: str
    runs: list[Run]
    table: str
    also: dict[str, str]


# ------------------------------------------------------------------ the sweep file


def load_sweep(path: str, common: Sequence[str] = ()) -> Sweep:
    """Reads a sweep file and builds the config of every run.

    Args:
        path: `configs/sweeps/x.py` or `configs/sweeps/x.py:arg`; arg goes to `get_sweep`.
        common: overrides `key=value` of all runs; those of the file come after them.

    Raises:
        DitError: the file is missing, fails or lacks a name; runs without names or with the same name; an
            unknown key, a value of the wrong type, or one with which no stage can run (`check_config`).
    """
    program = ProgramFile(path, "sweep", "get_sweep", "configs/sweeps/")
    values: dict[str, str] = {}
    for name in ("CONFIG", "SWEPT", "METRIC"):
        value = getattr(program.module, name, None)
        if not isinstance(value, str):
            raise DitError(f"{program.name} has no {name}: set it to a string")
        values[name] = value
    sweep_table.check_metric(values["METRIC"])
    table = getattr(program.module, "TABLE", "sweep")
    if not isinstance(table, str) or not NAME.fullmatch(table):
        raise DitError(f"{program.name}: TABLE must be the name of a file, not {table!r}")
    also = getattr(program.module, "ALSO", {})
    if not isinstance(also, dict) or not all(
        isinstance(x, str) for pair in also.items() for x in pair
    ):
        raise DitError(f"{program.name}: ALSO must be a dict of titles and metrics, not {also!r}")
    for other in also.values():
        sweep_table.check_metric(other)
    if "{arg}" in values["CONFIG"] and not program.arg:
        raise DitError(f"{program.name} needs an argument: write ':ARG' after .py")

    def listed(runs: Any) -> list[tuple[Any, dict[str, Any], str]]:
        return [
            (name, dict(overrides), str(other[0]) if other else values["CONFIG"])
            for name, overrides, *other in runs
        ]

    made = program.call(listed)
    if not made:
        raise DitError(f"sweep '{path}' has no runs")
    runs: list[Run] = []
    for name, overrides, base in made:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise DitError(
                f"sweep '{path}' has a run named {name!r}: use letters, digits and _ . = + -"
            )
        if any(name == run.name for run in runs):
            raise DitError(f"sweep '{path}' has two runs named '{name}': name each of them once")
        try:
            runs.append(
                _make_run(base.replace("{arg}", program.arg or ""), name, common, overrides)
            )
        except DitError as error:
            raise DitError(f"run '{name}' of sweep '{path}': {error}") from None
        if values["SWEPT"] not in flatten(runs[-1].config):
            raise DitError(
                f"{program.name}: SWEPT = '{values['SWEPT']}' is no key of {runs[-1].file}"
            )
    return Sweep(values["SWEPT"], values["METRIC"], runs, table, also)


def _make_run(base: str, name: str, common: Sequence[str], overrides: dict[str, Any]) -> Run:
    texts = [*common, *(f"{key}={_as_text(value)}" for key, value in _dotted(overrides))]
    # Types are checked before they become text.
    checked = load_config(base, overrides, optional_keys())
    config = load_config(base, texts, optional_keys())
    for key, value in _dotted(overrides):
        if flatten(config)[key] != flatten(checked)[key]:
            raise DitError(f"the value {value!r} of '{key}' cannot be written on a command line")
    check_config(config)
    return Run(name, texts, config, base)


def _dotted(overrides: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of all overrides, those inside sections included."""
    pairs = []
    for key, value in overrides.items():
        inner = isinstance(value, Mapping)
        pairs += _dotted(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return pairs


def _as_text(value: Any) -> str:
    """A value as `--config.key=value` reads it."""
    return value if isinstance(value, str) else repr(value)


# ------------------------------------------------------------------ one run


def command(run: Run, workdir: pathlib.Path) -> str:
    """The shell command that makes one run, quoted."""
    words = ["python", "-m", "dit_jax.main", "--config", run.file]
    words += ["--workdir", str(workdir / run.name)]
    return shlex.join([*words, *(f"--config.{text}" for text in run.overrides)])


def is_finished(run: Run, folder: pathlib.Path) -> bool:
    """Whether every stage of the run is done, with its config."""
    file = folder / CONFIG_FILE
    if not file.exists() or config_diff(saved_config(file), run.config, free_keys(run.config)):
        return False
    return all(
        stage_records.stage_done(folder, stage.name) and (folder / stage.folder).is_dir()
        for stage in chosen_stages(run.config.stages)
    )


def share_diffs(run: Run, others: Sequence[Run], workdir: pathlib.Path) -> str | None:
    """Links the diffs of a run that has the same ones (or copies them to another file system).

    The files of a diff store are never changed in place, so links are as good as copies.

    Returns:
        The name of the run that they come from; None if there is none, or if the run has its diffs already.
    """
    folder, ignored = workdir / run.name, (*free_keys(run.config), *LATER_SECTIONS)
    if "diffs" not in run.config.stages or (folder / "diffs").exists():
        return None
    for other in others:
        source = workdir / other.name
        if other.name == run.name or config_diff(other.config, run.config, ignored):
            continue
        record = stage_records.stage_done(source, "diffs")
        if record is None or not (source / "diffs" / artifacts.MANIFEST).is_file():
            continue
        check_workdir(other.config, source)
        check_workdir(run.config, folder)
        with artifacts.atomic_dir(folder / "diffs") as temporary:
            shutil.copytree(source / "diffs", temporary, copy_function=_link, dirs_exist_ok=True)
        artifacts.write_json(
            folder / "stages" / "diffs.json", {**record, "shared_from": other.name}
        )
        return other.name
    return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def make(sweep: Sweep, index: int, workdir: pathlib.Path) -> str | None:
    """Makes one run unless it is finished; returns None, or the message of its failure."""
    run = sweep.runs[index]
    folder = workdir / run.name
    title = f"run {index + 1} of {len(sweep.runs)}: {run.name}"
    try:
        if is_finished(run, folder):
            show(f"== {title}: done before")
            return None
        show(f"== {title}")
        if source := share_diffs(run, sweep.runs, workdir):
            show(f"the diffs of '{source}' are the same: taken from there")
        main.run(run.config, folder)
    except Exception as error:  # a bug in one run must not cost the others
        known = explained(error)
        if known is None:
            traceback.print_exc()
        message = str(known) if known else f"{type(error).__name__}: {first_line(error)}"
    else:
        return None
    show(f"error: {run.name}: {message}", error=True)
    return message


# ------------------------------------------------------------------ command line


def write_table(sweep: Sweep, workdir: pathlib.Path, failures: Mapping[str, str]) -> dict[str, str]:
    """Writes WORKDIR/TABLE.{md,csv,png} from what the runs have left so far, and prints the table.

    Returns:
        {name of a run whose summary lacks the metric: why}.
    """
    rows = [
        sweep_table.read_row(
            run.name,
            flatten(run.config)[sweep.swept],
            sweep.metric,
            workdir / run.name,
            failures.get(run.name),
            tuple(sweep.also.values()),
        )
        for run in sweep.runs
    ]
    titles = tuple(sweep.also)
    show(sweep_table.write(rows, sweep.swept, sweep.metric, workdir, sweep.table, titles))
    show(f"table and plot: {workdir / f'{sweep.table}.md'}")
    return {
        row.name: row.status
        for row in rows
        if row.name not in failures and row.status not in (sweep_table.DONE, sweep_table.NOT_RUN)
    }


def main_sweep(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a run failed, 2 for a problem of the sweep itself, 130 for Ctrl-C."""
    parser = Parser("python -m dit_jax.sweep", __doc__)
    parser.add_argument(
        "--sweep", required=True, help="configs/sweeps/NAME.py, or NAME.py:ARGUMENT"
    )
    parser.add_argument("--workdir", required=True, help="folder of all runs")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--list", action="store_true", help="print one shell command per run, and run nothing"
    )
    choice.add_argument("--index", type=int, help="run only this one, from 0 (for job arrays)")
    choice.add_argument(
        "--table", action="store_true", help="only make the table and plot of what is there"
    )
    return status_of(lambda: _sweep(parser, argv))


def _sweep(parser: Parser, argv: list[str] | None) -> int:
    rest, common = split_flags(sys.argv[1:] if argv is None else argv)
    flags = parser.parse_args(rest)
    sweep, workdir = load_sweep(flags.sweep, common), given_folder(flags.workdir)
    if flags.list:
        show("\n".join(command(run, workdir) for run in sweep.runs))
        return 0
    artifacts.make_dir(workdir)  # what refuses it would fail each run
    indices: Sequence[int] = range(len(sweep.runs))
    if flags.index is not None:
        if flags.index not in indices:
            raise DitError(f"--index {flags.index}: the sweep has runs 0 to {indices[-1]}")
        indices = [flags.index]
    if not flags.table:
        startup.prepare()
    messages = {} if flags.table else {i: make(sweep, i, workdir) for i in indices}
    failures = {sweep.runs[i].name: text for i, text in messages.items() if text}
    unread = write_table(sweep, workdir, failures)
    if failures:
        show(
            f"error: {len(failures)} of {len(messages)} runs failed: "
            f"{', '.join(failures)}; run the same command again to try them again",
            error=True,
        )
    if unread:
        name, reason = next(iter(unread.items()))
        show(
            f"error: {len(unread)} finished runs have no number for the table, first '{name}': {reason}",
            error=True,
        )
    return 1 if failures or unread else 0
