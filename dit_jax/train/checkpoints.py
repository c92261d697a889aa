"""Orbax, in one place: training checkpoints that are verified at restore, and the exported adapter.

Orbax restores a file with a flipped byte without a word, counts an empty folder as a checkpoint and has no way
back to an older step. So every checkpoint carries a digest of its state, and restoring takes the newest
one whose digest agrees.
"""

import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from dit_jax import artifacts, parallel, processes
from dit_jax.deltas import store
from dit_jax.errors import DitError, first_line
from dit_jax.models.layers import Delta

ADAPTER_FORMAT = "dit_jax.adapter"


class Checkpoints:
    """Checkpoints of a training run in one folder: `save` in the background, `restore` the newest sound one.

    They hold whole arrays, so a run may go on on another mesh and with another number of processes. All processes
    make every call.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int = 2):
        from orbax.checkpoint import v1 as ocp

        self.folder = pathlib.Path(folder).absolute()
        artifacts.make_dir(self.folder)
        self._saving: Any = None
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, iterator_state: Any) -> None:
        """Starts an asynchronous save; waits for an earlier one first. Returns once the state may be reused."""
        state = parallel.to_host(state)
        metadata = {"digest": artifacts.digest_tree(state), "iterator": iterator_state}
        if self._saving is not None:
            self._saving.result()  # Orbax would leave out a save that comes during another one
        self._saving = self._checkpointer.save_async(
            step, state, force=True, custom_metadata=metadata
        )

    def restore(self, like: Any) -> tuple[int, Any, Any] | None:
        """(step, state, iterator state) of the newest checkpoint whose digest agrees, None if there is none.

        The state comes back with the shardings of `like`, whatever mesh it was saved from. Unsound checkpoints
        are named on stderr and deleted, so that training can write that step again.
        """
        abstract = jax.tree.map(lambda x: _abstract(np.shape(x), x.dtype), like)
        steps = sorted(
            (int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()), reverse=True
        )
        for step in steps:
            try:
                state = self._checkpointer.load(step, abstract)
                metadata = self._checkpointer.metadata(step).custom_metadata
                sound = artifacts.digest_tree(state) == metadata["digest"]
            except Exception as e:  # whatever Orbax or tensorstore say of a damaged folder
                sound, metadata, state = False, str(e), None
            if processes.agree(sound):
                return step, jax.tree.map(_place_like, state, like), metadata["iterator"]
            if processes.is_main():
                print(
                    f"checkpoint {self.folder / str(step)} is damaged: going back to the one before",
                    file=sys.stderr,
                )
                shutil.rmtree(self.folder / str(step))
            processes.barrier("damaged checkpoint deleted")
            self._checkpointer.reload()
        return None

    def close(self) -> None:
        self._checkpointer.close()


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
    written = (
        folder.parent / f".{folder.name}.checkpoint"
    )  # a name that all processes know: Orbax asks all of them
    processes.on_main(lambda: shutil.rmtree(written, ignore_errors=True))
    artifacts.make_dir(folder.parent)
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


def load_adapter(
    folder: str | pathlib.Path, place: Callable[[np.ndarray], Any] = jnp.asarray
) -> tuple[Delta, dict[str, Any]]:
    """The delta of an exported adapter, and its manifest.

    Raises:
        DitError: no adapter there, or a damaged one (every file and the restored values are checked).
    """
    from orbax.checkpoint import v1 as ocp

    folder = pathlib.Path(folder)
    remedy = "run the stage 'train' that writes it"
    manifest = artifacts.read_manifest(folder, ADAPTER_FORMAT, remedy=remedy)
    try:
        abstract = store.unflatten(
            {
                name: _abstract(tuple(shape), dtype)
                for name, (shape, dtype) in manifest["leaves"].items()
            }
        )
        adapter = ocp.load((folder / "checkpoint").absolute(), abstract)
    except Exception as e:
        raise DitError(f"{folder} cannot be restored ({first_line(e)[:100]}): {remedy}") from None
    if artifacts.digest_tree(adapter) != manifest.get("digest"):
        raise DitError(f"{folder} is damaged (its values differ from the digest): {remedy}")
    return jax.tree.map(place, adapter), manifest


def _abstract(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    # A numpy target: Orbax would restore jax arrays onto the devices that wrote them, which may not exist here.
    return np.empty(shape, dtype)


def _place_like(host: np.ndarray, like: Any) -> jax.Array:
    if isinstance(like, jax.Array) and not isinstance(like.sharding, SingleDeviceSharding):
        return parallel.put(host, like.sharding)
    return jnp.asarray(host)
