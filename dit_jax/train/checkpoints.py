"""Orbax, in one place: training checkpoints that are verified at restore, and the exported adapter.

Orbax restores a file with a flipped byte without a word, counts an empty folder as a checkpoint and has no way
back to an older step. So every checkpoint carries digests of its arrays and of the place in the data, and restoring
takes the newest one whose digests agree. The others are moved aside, not deleted: what looks damaged may be needed
after all.
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dit_jax import artifacts, parallel, processes
from dit_jax.deltas import store
from dit_jax.deltas.files import check_tree, short
from dit_jax.deltas.names import FLOATS, check_shapes
from dit_jax.errors import DitError, first_line
from dit_jax.models.config import Qwen3Config
from dit_jax.models.layers import Delta
from dit_jax.os_errors import has_remedy, may_pass, os_error

ADAPTER_FORMAT = "dit_jax.adapter"
MAX_EXTRA_BYTES = 16 * 2**20  # what Orbax may write beside the values of an adapter


class Checkpoints:
    """Checkpoints of a training run in one folder: `save` in the background, `restore` the newest sound one.

    They hold whole arrays, so a run may go on on another mesh and with another number of processes. All processes
    make every call.

    Args:
        folder: holds one folder for each step.
        keep: how many to keep; those that were moved aside do not count.
        data: digest of what the run trains on.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 2, data: str | None = None):
        from orbax.checkpoint import v1 as ocp

        self.folder, self._data = pathlib.Path(folder).absolute(), data
        artifacts.make_dir(self.folder)
        _say_errors_once()
        self._saving: Any = None
        with _explain_save(self.folder):
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=ocp.training.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=True,
            )

    def save(self, step: int, state: Any, iterator_state: Any) -> None:
        """Starts an asynchronous save; waits for an earlier one first. Returns once the state may be reused.

        Raises:
            DitError: the file system refuses this save or the earlier one. Older checkpoints are as they were.
        """
        state = parallel.to_host(state)
        metadata = {
            "digests": _digests(state, iterator_state),
            "iterator": iterator_state,
            "data": self._data,
        }
        self.wait()
        with _explain_save(self.folder):
            self._saving = self._checkpointer.save_async(
                step, state, force=True, custom_metadata=metadata
            )

    def wait(self) -> None:
        """Waits for the save under way; Orbax would leave out one that comes during another one.

        Raises:
            DitError: the file system refused it.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with _explain_save(self.folder):
                saving.result()

    def restore(self, like: Any) -> tuple[int, Any, Any] | None:
        """(step, state, iterator state) of the newest sound checkpoint of this data, None if there is none.

        The state comes back with the shardings of `like`, whatever mesh it was saved from. A checkpoint of which a
        digest does not agree, or of other data, is named on stderr and moved aside: its step can be written again.

        Raises:
            DitError: a checkpoint cannot be read for a reason that may pass: it is left alone.
        """
        abstract = jax.tree.map(lambda x: _abstract(np.shape(x), x.dtype), like)
        steps = sorted(
            (int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()), reverse=True
        )
        for step in steps:
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

    def _load(self, step: int, abstract: Any) -> tuple[Any, Any, "_Problem | None"]:
        try:
            metadata = self._checkpointer.metadata(step).custom_metadata
            if metadata.get("data", self._data) != self._data:
                return None, None, _Problem("other-data", "it was trained on other diffs")
            state = self._checkpointer.load(step, abstract)
            found, saved = _digests(state, metadata["iterator"]), metadata["digests"]
            for name in sorted(found.keys() | saved.keys()):
                if found.get(name) != saved.get(name):
                    return None, None, _Problem("damaged", f"{name} differs from its digest")
        except Exception as error:  # whatever Orbax or tensorstore say of a damaged folder
            number = os_error(error)
            kind = "unreadable" if may_pass(number) else "damaged"
            reason = os.strerror(number) if number else first_line(error)
            return None, None, _Problem(kind, reason[:200])
        return state, metadata, None

    def _set_aside(self, step: int, kind: str, reason: str) -> None:
        def move() -> None:
            target = self.folder / f"{kind}-{step}"
            count = 2
            while target.exists():
                target, count = self.folder / f"{kind}-{step}.{count}", count + 1
            with artifacts.explain_os_errors("move aside", self.folder / str(step)):
                (self.folder / str(step)).rename(target)
            print(
                f"checkpoint '{self.folder / str(step)}' is not used ({reason or kind}): "
                f"moved to '{target.name}', going back to the one before",
                file=sys.stderr,
            )

        processes.on_main(move)
        self._checkpointer.reload()

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
            DitError: the file system refused it.
        """
        try:
            self.wait()
        finally:
            # It would raise a failed save again, which `wait` has reported.
            with contextlib.suppress(Exception):
                self._checkpointer.close()


def _digests(state: Any, iterator_state: Any) -> dict[str, str]:
    """sha256 of each leaf of the state by its path, and of the iterator's."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    text = json.dumps(iterator_state, sort_keys=True)
    return {
        **{jax.tree_util.keystr(path): artifacts.digest_tree(leaf) for path, leaf in leaves},
        "iterator": hashlib.sha256(text.encode()).hexdigest(),
    }


# Why a checkpoint is not used, the worst last; None: it is.
_PROBLEMS = (None, "other-data", "damaged", "unreadable")


class _Problem(NamedTuple):
    kind: str
    text: str


class _Reported(logging.Filter):
    """Drops the tracebacks that Orbax's threads log of errors which `Checkpoints` reports in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not ("orbax" in record.pathname and error and has_remedy(os_error(error)))


class _Unraisable:
    """Drops what tensorstore says of the other writes when one has failed: their event loop is closed by then."""

    def __init__(self, hook: Any):
        self._hook = hook

    def __call__(self, args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":
            self._hook(args)


def _say_errors_once() -> None:
    """A refused save is one line of `explain_os_errors`, without the tracebacks of the libraries' threads."""
    logging.getLogger("absl").addFilter(_REPORTED)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


_explain_save = functools.partial(artifacts.explain_os_errors, "save a checkpoint in")
_REPORTED = _Reported()


def export_adapter(folder: str | pathlib.Path, adapter: Delta, **facts: Any) -> None:
    """Writes an adapter: an Orbax checkpoint, with a manifest of shapes, digest and facts beside it.

    All processes call it.
    """
    from orbax.checkpoint import v1 as ocp

    adapter = parallel.to_host(adapter)
    shapes = {
        name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in store.flatten(adapter).items()
    }
    folder = pathlib.Path(folder).absolute()
    # A name that all processes know: Orbax asks all of them.
    written = folder.parent / f".{folder.name}.checkpoint"

    def clear() -> None:  # what a killed process left, Orbax's temporary folders included
        for leftover in folder.parent.glob(f"{written.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    processes.on_main(clear)
    artifacts.make_dir(folder.parent)
    _say_errors_once()
    with _explain_save(folder.parent):
        ocp.save(written, adapter)

    def publish() -> None:
        with artifacts.atomic_dir(folder, replace=True) as temporary:
            written.rename(temporary / "checkpoint")
            artifacts.write_manifest(
                temporary,
                ADAPTER_FORMAT,
                leaves=shapes,
                digest=artifacts.digest_tree(adapter),
                **facts,
            )

    processes.on_main(publish)


def load_adapter(folder: str | pathlib.Path, config: Qwen3Config) -> tuple[Delta, dict[str, Any]]:
    """The delta of an exported adapter, and its manifest.

    The folder is untrusted: before Orbax reads values, names, shapes and sizes must be those of an adapter of
    the model `config`.

    Raises:
        DitError: no adapter there, one that does not fit the model, or a damaged one (every file and the
            restored values are checked).
    """
    from orbax.checkpoint import v1 as ocp

    folder = pathlib.Path(folder)
    checkpoint = (folder / "checkpoint").absolute()
    remedy = "run the stage 'train' that writes it"
    check_tree(folder)
    manifest = artifacts.read_manifest(folder, ADAPTER_FORMAT, remedy=remedy)
    promised = _promised(manifest, folder)
    check_shapes(promised, config, str(folder))
    held = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(promised))
    if held > 4 * needed + MAX_EXTRA_BYTES:
        raise DitError(f"'{checkpoint}' has {held} bytes, its adapter needs {needed}: {remedy}")
    with _silent():
        try:
            _check_chunks(store.flatten(ocp.metadata(checkpoint).metadata), promised)
            adapter = ocp.load(
                checkpoint, jax.tree.map(lambda x: _abstract(x.shape, x.dtype), promised)
            )
        except Exception as e:
            problem = f"{folder} cannot be restored ({first_line(e)[:100]}): {remedy}"
            del e
            gc.collect()  # asyncio logs the errors of tasks when these are freed
            raise DitError(problem) from None
    if artifacts.digest_tree(adapter) != manifest.get("digest"):
        raise DitError(f"{folder} is damaged (its values differ from the digest): {remedy}")
    return jax.tree.map(jnp.asarray, adapter), manifest


def _promised(manifest: dict[str, Any], folder: pathlib.Path) -> Delta:
    """The shapes that the manifest of an adapter lists, as a tree."""
    listed = manifest.get("leaves")
    leaves = {}
    for name, entry in listed.items() if isinstance(listed, dict) else ():
        match entry:
            case [[*shape], str(dtype)] if all(type(n) is int and 0 < n < 2**31 for n in shape):
                if dtype in FLOATS and len(shape) <= 8:
                    leaves[name] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
                    continue
        raise DitError(
            f"'{folder / artifacts.MANIFEST}' says of the leaf {short(name)} no shape and dtype: get "
            "another adapter"
        )
    return store.unflatten(leaves)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Orbax and asyncio log many lines, with tracebacks, about a damaged file that is one line here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _check_chunks(stored: dict[str, Any], promised: Delta) -> None:
    """A chunk larger than its array would be unpacked whole: a few bytes could fill any memory."""
    for name, leaf in store.flatten(promised).items():
        if name not in stored:
            raise ValueError(f"the checkpoint lacks {name}")
        chunk = stored[name].storage_metadata.chunk_shape
        if stored[name].shape != leaf.shape or any(
            c > n for c, n in zip(chunk, leaf.shape, strict=True)
        ):
            raise ValueError(f"{name} is stored in another shape")


def _abstract(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    # A numpy target: Orbax would restore jax arrays onto the devices that wrote them, which may not exist here.
    return np.empty(shape, dtype)


def _place_like(host: np.ndarray, like: Any) -> jax.Array:
    if isinstance(like, jax.Array) and not isinstance(like.sharding, SingleDeviceSharding):
        return parallel.put(host, like.sharding)
    return jnp.asarray(host)
