"""Training checkpoints, written by Orbax and verified when they are restored.

Orbax silently restores a file with a flipped byte, takes an empty folder for a checkpoint, and cannot go back to an
older step. So every checkpoint carries digests of its arrays and of its position in the data, and the newest one whose
digests agree is restored. The others are moved aside, not deleted, because they may still be needed.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import check_tree
from dit_jax.runtime import artifacts, digests, parallel, processes
from dit_jax.runtime.orbax_errors import (
    check_path,
    explain_save,
    has_larger_chunks,
    host_target,
    said_by_us,
    say_errors_once,
)
from dit_jax.runtime.os_errors import explain_os_errors, may_pass, os_error
from dit_jax.runtime.outgoing import show


class Checkpoints:
    """Checkpoints of a training run in one folder: `save` in the background, `restore` the newest sound one.

    They hold whole arrays, so that a run can resume on another mesh or with another number of processes. All processes
    must make every call.

    Args:
        folder: holds one folder for each step.
        keep: how many to keep, without those that were moved aside.
        data: digest of what the run trains on.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 2, data: str | None = None):
        from orbax.checkpoint import v1 as ocp

        check_path(folder)
        self.folder, self._data = pathlib.Path(folder).absolute(), data
        artifacts.make_dir(self.folder)
        say_errors_once()
        self._saving: Any = None
        policy = ocp.training.preservation_policies.LatestN(keep)

        def open_folder(folder: pathlib.Path) -> Any:
            with explain_save(folder), said_by_us():
                return ocp.training.Checkpointer(
                    folder, preservation_policy=policy, cleanup_tmp_directories=True
                )

        for step in self._steps():
            try:
                check_tree(self.folder / str(step))  # Orbax would wait for a pipe
            except DitError as error:
                self._move_aside(step, "damaged", str(error))
        try:
            self._checkpointer = open_folder(self.folder)
        except DitError:
            raise
        except Exception:  # Orbax reads the metadata of all steps at once
            for step in self._steps():
                if not _opens(self.folder / str(step), open_folder):
                    self._move_aside(step, "damaged", "its metadata cannot be read")
            self._checkpointer = open_folder(self.folder)

    def save(self, step: int, state: Any, iterator_state: Any) -> None:
        """Waits for an earlier save, then starts one in the background. Returns once the state may be reused.

        Raises:
            DitError: the file system refuses this save or the earlier one; older checkpoints are unchanged.
        """
        state = parallel.to_host(state)
        metadata = {
            "digests": _digests(state, iterator_state),
            "iterator": iterator_state,
            "data": self._data,
        }
        self.wait()
        with explain_save(self.folder):
            self._saving = self._checkpointer.save_async(
                step, state, force=True, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Waits for the save under way, during which Orbax would skip another. Raises DitError: it was refused."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with explain_save(self.folder):
                saving.result()

    def restore(self, like: Any) -> tuple[int, Any, Any] | None:
        """(step, state, iterator state) of the newest sound checkpoint of this data; None if there is none.

        The state gets the shardings of `like`, whatever mesh it was saved from. A checkpoint whose digests disagree, or
        that is of other data, is reported on stderr and moved aside, so that its step can be written again.

        Raises:
            DitError: a checkpoint cannot be read now but perhaps later; it is left alone.
        """
        abstract = jax.tree.map(lambda x: host_target(np.shape(x), x.dtype), like)
        for step in self._steps():
            with said_by_us():
                state, metadata, problem = self._load(step, abstract)
            # One process may fail to read what the others can.
            match processes.highest(_PROBLEMS.index(problem.kind if problem else None)):
                case 0:
                    return step, jax.tree.map(_place_like, state, like), metadata["iterator"]
                case 3:
                    said = problem.text if problem else "another process cannot read it"
                    raise DitError(
                        f"the checkpoint '{self.folder / str(step)}' cannot be read now ({said}): "
                        "run the same command again; if that does not help, delete that folder"
                    )
                case worst:
                    self._set_aside(step, _PROBLEMS[worst] or "", problem.text if problem else "")
        return None

    def _steps(self) -> list[int]:
        """The steps that have a checkpoint, the newest first."""
        names = (path.name for path in self.folder.iterdir())
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _load(self, step: int, abstract: Any) -> tuple[Any, Any, "_Problem | None"]:
        try:
            described = self._checkpointer.metadata(step)
            metadata = described.custom_metadata
            if metadata.get("data", self._data) != self._data:
                return None, None, _Problem("other-data", "it was trained on other diffs")
            if not {"digests", "iterator"} <= metadata.keys():
                return None, None, _Problem("damaged", "it has no digests")
            _check_sizes(described.metadata, abstract)
            state = self._checkpointer.load(step, abstract)
            if list(map(np.shape, jax.tree.leaves(state))) != _shapes(abstract):
                return None, None, _Problem("damaged", _OTHER_SHAPES)
            found, saved = _digests(state, metadata["iterator"]), metadata["digests"]
            for name in sorted(found.keys() | saved.keys()):
                if found.get(name) != saved.get(name):
                    return None, None, _Problem("damaged", f"{name} differs from its digest")
        except Exception as error:  # Orbax and tensorstore raise many kinds for a damaged folder
            number = os_error(error)
            kind = "unreadable" if may_pass(number) else "damaged"
            reason = os.strerror(number) if number else first_line(error)
            return None, None, _Problem(kind, reason[:200])
        return state, metadata, None

    def _set_aside(self, step: int, kind: str, reason: str) -> None:
        self._move_aside(step, kind, reason)
        with said_by_us():
            self._checkpointer.reload()

    def _move_aside(self, step: int, kind: str, reason: str) -> None:
        def move() -> None:
            target = self.folder / f"{kind}-{step}"
            count = 2
            while target.exists():
                target, count = self.folder / f"{kind}-{step}.{count}", count + 1
            with explain_os_errors("move aside", self.folder / str(step)):
                (self.folder / str(step)).rename(target)
            show(
                f"checkpoint '{self.folder / str(step)}' is not used ({reason or kind}): "
                f"moved to '{target.name}', going back to the one before",
                error=True,
            )

        processes.on_main(move)

    def close(self) -> None:
        """Waits for the save under way. Raises DitError: it was refused."""
        try:
            self.wait()
        finally:
            # It would raise again for a failed save, which `wait` has reported.
            with contextlib.suppress(Exception):
                self._checkpointer.close()


_OTHER_SHAPES = "its arrays have other shapes"


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in jax.tree.leaves(tree)]


def _check_sizes(stored: Any, abstract: Any) -> None:
    """Raises ValueError: the arrays differ from those of the run, or have chunks larger than themselves."""
    if sorted(_shapes(stored)) != sorted(_shapes(abstract)):
        raise ValueError(_OTHER_SHAPES)
    if any(map(has_larger_chunks, jax.tree.leaves(stored))):
        raise ValueError("its chunks are larger than its arrays")


def _digests(state: Any, iterator_state: Any) -> dict[str, str]:
    """sha256 of each leaf of the state, by its path, and of the iterator's state."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    text = json.dumps(iterator_state, sort_keys=True)
    return {
        **{jax.tree_util.keystr(path): digests.digest_tree(leaf) for path, leaf in leaves},
        "iterator": hashlib.sha256(text.encode()).hexdigest(),
    }


def _opens(step: pathlib.Path, open_folder: Callable[[pathlib.Path], Any]) -> bool:
    """Whether Orbax can read the metadata of one step."""
    with artifacts.TemporaryFolder("dit_jax-checkpoint-") as place:
        alone = pathlib.Path(place) / step.name
        alone.mkdir()
        for file in step.iterdir():
            if file.is_file():
                shutil.copy(file, alone)
        try:
            open_folder(alone.parent).close()
        except Exception:  # of many kinds
            return False
    return True


# Why a checkpoint is not used, the worst reason last; None: it is used.
_PROBLEMS = (None, "other-data", "damaged", "unreadable")


class _Problem(NamedTuple):
    kind: str
    text: str


def _place_like(host: np.ndarray, like: Any) -> jax.Array:
    if isinstance(like, jax.Array) and not isinstance(like.sharding, SingleDeviceSharding):
        return parallel.put(host, like.sharding)
    return jnp.asarray(host)
