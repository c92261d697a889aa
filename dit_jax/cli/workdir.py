"""The folder of a run: it belongs to one config, and says which stages are finished and still current."""

import functools
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dit_jax.cli.stages import STAGES, Stage, free_keys, named_files
from dit_jax.config.loading import config_diff, load_saved, save_config
from dit_jax.errors import DitError
from dit_jax.evaluate.evaluate_keys import EVALUATE, GRADING_KEYS
from dit_jax.formats.files import user_path
from dit_jax.runtime import artifacts, orbax_errors, processes, stage_records

CONFIG_FILE = "config.json"
_OF_THE_REPORT = tuple(EVALUATE.dotted(key.name) for key in GRADING_KEYS)
# By section: what is in the workdir once a stage that reads it has begun. Until then the section may change.
LATER_SECTIONS = {
    section.name: stage.traces
    for stage in STAGES.values()
    if stage.traces
    for section in stage.sections
}
_LISTS = "lists"  # copies of the text files that the config names: the originals may move
# In the workdir before anything is made.
_OF_THE_START = (CONFIG_FILE, _LISTS, "versions.json", "metrics")
_SHOWN_DIFFERENCES = 5


def given_folder(text: str) -> Path:
    """The folder that --workdir names. Raises DitError: an empty name, an address, or see `orbax_errors.check_path`."""
    if not text.strip():
        raise DitError("--workdir is empty: give the folder of the run")
    if "://" in text:
        raise DitError(f"the workdir {text!r} is an address: mount the bucket and give its folder")
    folder = user_path(text)
    orbax_errors.check_path(folder)
    return folder


def check_workdir(
    config: ConfigDict, workdir: artifacts.PathLike, ignore: Iterable[str] | None = None
) -> None:
    """Binds a workdir to a config: writes WORKDIR/config.json at first use, compares it later.

    A workdir in which nothing was made yet is bound anew, and so are the sections of stages that have not begun. Text
    files that the config names are compared by their text.

    Args:
        config: the config of this run.
        workdir: the run's folder; made when it is not there.
        ignore: keys that may differ (patterns as in `config_diff`); None: those that change no result.

    Raises:
        DitError: what was made belongs to another config (the differences are in the message), the workdir has
            finished stages but no config, or cannot be written.
    """
    folder = artifacts.make_dir(workdir)
    file = folder / CONFIG_FILE
    made = [
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".") and not _is_empty_folder(path)
    ]
    if set(made) <= set(_OF_THE_START):
        _bind(config, file)  # a mistyped value does not bind the folder
        return
    if not file.exists() and not _copy(file).exists():
        if (folder / "stages").exists():
            raise DitError(f"'{file}' is missing beside finished stages: use a new --workdir")
        _bind(config, file)
        return
    begun = {
        section: [f"'{folder / name}'" for name in names if name in made]
        for section, names in LATER_SECTIONS.items()
    }
    saved, ignored = saved_config(file), tuple(free_keys(config) if ignore is None else ignore)
    texts = _compare_lists(config, folder)
    edited = [f"{key}: its lines have changed" for key, same in texts.items() if not same]
    lines = [
        line
        for line in [*edited, *config_diff(saved, config, (*ignored, *_OF_THE_REPORT, *texts))]
        if begun.get(_section(line), True)
    ]
    if not lines:
        if edited or config_diff(saved, config, ignored):
            _bind(config, file)
        return
    more = len(lines) - _SHOWN_DIFFERENCES
    shown = "; ".join(lines[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    remedy = "use a new --workdir or delete this one"
    sections = sorted(set(map(_section, lines)))
    if set(sections) <= set(LATER_SECTIONS):
        folders = " and ".join(name for section in sections for name in begun[section])
        remedy = f"delete {folders} to have that made again, or use a new --workdir"
    raise DitError(f"'{workdir}' belongs to another config ({shown}): {remedy}")


def _copy(file: Path) -> Path:
    """Its second copy: a damaged config must not cost diffs that took hours."""
    return file.with_name(f".{file.name}")


def _bind(config: ConfigDict, file: Path) -> None:
    save_config(config, file)
    save_config(config, _copy(file))
    for key, path in named_files(config).items():
        if Path(path).is_file():  # a stage that needs it says that it is missing
            artifacts.write_bytes(_list_copy(file.parent, key), Path(path).read_bytes())


def _list_copy(folder: Path, key: str) -> Path:
    return folder / _LISTS / f"{key}.txt"


def _compare_lists(config: ConfigDict, folder: Path) -> dict[str, bool]:
    """Key of a text file -> whether it still says what it said, for the files that are there beside their copies."""
    files = {
        key: (Path(path), _list_copy(folder, key)) for key, path in named_files(config).items()
    }
    return {
        key: path.read_bytes() == copy.read_bytes()
        for key, (path, copy) in files.items()
        if path.is_file() and copy.is_file()
    }


def saved_config(file: Path) -> ConfigDict:
    """The config that a workdir belongs to. Raises DitError: the file and its copy are missing or damaged."""
    try:
        return load_saved(file)
    except DitError as error:
        if not _copy(file).exists():
            raise
        saved = load_saved(_copy(file))
        save_config(saved, file)
        processes.say(f"note: {error}. It was written anew from its copy")
        return saved


def _is_empty_folder(path: Path) -> bool:
    """Whether a stage failed before it made anything in its folder."""
    return path.is_dir() and not any(path.iterdir())


def _section(line: str) -> str:
    """The section of the key that starts a line: "train" of "train.steps: 400 -> 800"."""
    return re.split(r"\W", line, maxsplit=1)[0]


def is_done(workdir: Path, stage: Stage, config: Any) -> bool:
    """Whether a stage is finished, its artifact is there, and what it was made from has not changed since.

    A record without its artifact does not count: the folder was deleted to have it made again. The same holds for the
    manifest and for a file that it lists. The stage then makes what is missing and keeps the rest.

    Raises:
        DitError: the record or the manifest is broken, or a file has another size than the manifest says.
    """
    record = stage_records.stage_done(workdir, stage.name)
    folder = workdir / stage.folder
    if not record or not folder.is_dir():
        return False
    if stage.has_manifest and (missing := artifacts.missing_file(folder)):
        processes.say(f"[{stage.name}] '{folder / missing}' is missing: run again")
        return False
    made_from = record.get("inputs") or {}
    for name, digest in input_digests(workdir, stage, config).items():
        if made_from.get(name, digest) != digest:
            read = STAGES[name].folder if name in STAGES else name
            processes.say(f"[{stage.name}] '{read}' has changed since: run again")
            return False
    return True


def input_digests(workdir: Path, stage: Stage, config: Any) -> dict[str, str]:
    """{stage, or folder of another run: digest of its artifact} for what a stage reads, where it exists."""
    folders = {name: STAGES[name].folder for name in stage.reads}
    folders |= {folder: folder for folder in stage.reads_others(config)}
    digests = {name: artifacts.content_digest(workdir / folder) for name, folder in folders.items()}
    return {name: digest for name, digest in digests.items() if digest}


def run_once(workdir: Path, stage: Stage, config: Any, work: Callable[[], dict[str, Any]]) -> None:
    """Runs a stage and marks it as finished, with its time, its facts and what it was made from.

    It removes an earlier mark first: a stage that is interrupted while it runs again is not finished.

    Args:
        work: runs the stage and returns facts for its record. Process 0 alone calls it if the stage always runs.
    """
    start = time.monotonic()
    inputs = input_digests(workdir, stage, config)
    processes.on_main(lambda: stage_records.unmark_done(workdir, stage.name))

    def record(facts: dict[str, Any]) -> None:
        seconds = time.monotonic() - start
        stage_records.mark_done(workdir, stage.name, seconds, {**facts, "inputs": inputs})

    if stage.always:
        processes.on_main(lambda: record(work()))
    else:
        processes.on_main(functools.partial(record, work()))
