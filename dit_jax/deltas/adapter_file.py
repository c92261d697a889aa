"""The DIT adapter on disk: an Orbax checkpoint with a manifest of shapes and digest beside it."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from dit_jax.deltas import store
from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import check_tree, short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import FLOATS, Delta, check_shapes, nbytes
from dit_jax.runtime import artifacts, digests, parallel, processes
from dit_jax.runtime.orbax_errors import (
    check_path,
    explain_save,
    has_larger_chunks,
    host_target,
    said_by_us,
    say_errors_once,
)

ADAPTER_FORMAT = "dit_jax.adapter"
MAX_EXTRA_BYTES = 16 * 2**20  # what Orbax may write besides the values of an adapter


def export_adapter(folder: str | pathlib.Path, adapter: Delta, **facts: Any) -> None:
    """Writes an adapter: an Orbax checkpoint, with a manifest of shapes, digest and facts beside it.

    All processes call it. Raises DitError: the file system refuses, or see `check_path`.
    """
    from orbax.checkpoint import v1 as ocp

    check_path(folder)
    adapter = parallel.to_host(adapter)
    shapes = {
        name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in store.flatten(adapter).items()
    }
    folder = pathlib.Path(folder).absolute()
    # All processes know this name, because Orbax needs it in each of them.
    written = folder.parent / f".{folder.name}.checkpoint"

    def clear() -> None:  # removes what a killed process left, including Orbax's temporary folders
        for leftover in folder.parent.glob(f"{written.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    processes.on_main(clear)
    artifacts.make_dir(folder.parent)
    say_errors_once()
    with explain_save(folder.parent):
        ocp.save(written, adapter)

    def publish() -> None:
        with artifacts.atomic_dir(folder, replace=True) as temporary:
            written.rename(temporary / "checkpoint")
            artifacts.write_manifest(
                temporary,
                ADAPTER_FORMAT,
                leaves=shapes,
                digest=digests.digest_tree(adapter),
                **facts,
            )

    processes.on_main(publish)


def load_adapter(folder: str | pathlib.Path, config: DecoderConfig) -> tuple[Delta, dict[str, Any]]:
    """The delta of an exported adapter, and its manifest.

    The folder is untrusted: before Orbax reads values, names, shapes and sizes are checked against the model
    `config`.

    Raises:
        DitError: there is no adapter, it does not fit the model, or it is damaged (every file and the restored values
            are checked).
    """
    from orbax.checkpoint import v1 as ocp

    folder = pathlib.Path(folder)
    check_path(folder, written=False)
    checkpoint = (folder / "checkpoint").absolute()
    remedy = "run the stage 'train' that writes it"
    check_tree(folder)
    manifest = artifacts.read_manifest(folder, ADAPTER_FORMAT, remedy=remedy)
    promised = _promised(manifest, folder)
    check_shapes(promised, config, str(folder))
    held = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    needed = nbytes(promised)
    if held > 4 * needed + MAX_EXTRA_BYTES:
        raise DitError(f"'{checkpoint}' has {held} bytes, its adapter needs {needed}: {remedy}")
    problem = ""
    say_errors_once()
    with said_by_us():
        try:
            _check_chunks(store.flatten(ocp.metadata(checkpoint).metadata), promised)
            adapter = ocp.load(
                checkpoint, jax.tree.map(lambda x: host_target(x.shape, x.dtype), promised)
            )
        # Of many kinds; raised below, without what holds the tasks of asyncio.
        except Exception as e:
            problem = f"{folder} cannot be restored ({first_line(e)[:100]}): {remedy}"
    if problem:
        raise DitError(problem)
    if digests.digest_tree(adapter) != manifest.get("digest"):
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
            f"'{folder / artifacts.MANIFEST}' gives no valid shape and dtype for the leaf {short(name)}: get "
            "another adapter"
        )
    return store.unflatten(leaves)


def _check_chunks(stored: dict[str, Any], promised: Delta) -> None:
    """Raises ValueError for an array that is missing, has another shape, or chunks larger than itself."""
    for name, leaf in store.flatten(promised).items():
        if name not in stored:
            raise ValueError(f"the checkpoint lacks {name}, or cannot be read")
        if stored[name].shape != leaf.shape or has_larger_chunks(stored[name]):
            raise ValueError(f"{name} is stored in another shape")
