"""The records of finished stages in a run's folder, and what a process took."""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError
from dit_jax.formats.json_shape import fits, maybe, optional
from dit_jax.runtime import artifacts
from dit_jax.runtime.os_errors import explain_os_errors


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _stage_file(workdir: artifacts.PathLike, stage: str) -> Path:
    return Path(workdir) / "stages" / f"{stage}.json"


def stage_done(workdir: artifacts.PathLike, stage: str) -> dict[str, Any] | None:
    """The record that `mark_done` wrote for a finished stage, or None. Raises DitError: the record is broken."""
    file = _stage_file(workdir, stage)
    if not file.exists():
        return None
    record: dict[str, Any] = artifacts.read_json(file, f"run the stage '{stage}' again")
    if not fits(record, optional(inputs=maybe({}))):
        raise DitError(f"'{file}' is not the record of a stage: delete it and run the stage again")
    return record


def unmark_done(workdir: artifacts.PathLike, stage: str) -> None:
    """Removes the record of a stage, if there is one. Raises DitError when the file system refuses."""
    file = _stage_file(workdir, stage)
    with explain_os_errors("delete", file):
        file.unlink(missing_ok=True)


def mark_done(
    workdir: artifacts.PathLike, stage: str, seconds: float, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Marks a stage as finished in WORKDIR/stages/<stage>.json and returns the record.

    Args:
        seconds: wall time of the stage.
        extra: further JSON values to keep with it.
    """
    record = {
        **(extra or {}),
        "stage": stage,
        "seconds": round(float(seconds), 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "finished": artifacts.now(),
    }
    artifacts.write_json(_stage_file(workdir, stage), record)
    return record
