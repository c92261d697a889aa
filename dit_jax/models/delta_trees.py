"""Deltas that the model takes: pytrees of LoRA factors or dense changes, checked against its modules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.errors import DitError, did_you_mean
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import Path, all_modules

Delta = Mapping[str, Any]
Deltas = Sequence[Delta]


def abstract_stack(one: Delta, count: int, axis: int) -> Delta:
    """Shapes of `count` deltas like `one`, stacked on axis 0 (finetunes) or 1 (one for each example of a batch)."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*x.shape[:axis], count, *x.shape[axis:]), x.dtype), one
    )


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, which may be `jax.ShapeDtypeStruct`s of arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def nbytes_each(stacked: Any) -> int:
    """Bytes of one of the deltas that lie beside each other on the first axis of every array."""
    return sum(nbytes(x) // len(x) for x in jax.tree.leaves(stacked))


def map_modules(fn: Callable[[tuple[str, ...], Delta], Any], delta: Delta) -> Delta:
    """Applies fn(path, module) to every module of a delta: a dict with `w`, or with `a`, `b` and `scale`."""

    def walk(path: tuple[str, ...], node: Delta) -> Any:
        if "w" in node or "a" in node:
            return fn(path, node)
        return {name: walk((*path, name), child) for name, child in node.items()}

    return walk((), delta)


FLOATS = ("float64", "float32", "float16", "bfloat16")


def check_shapes(delta: Delta, config: DecoderConfig, what: str) -> None:
    """Raises DitError unless every module of a delta is one of this model and holds floats in the right shapes.

    The leaves may be arrays, or `jax.ShapeDtypeStruct`s of arrays that are still to be read.
    """
    if not jax.tree.leaves(delta):
        raise DitError(f"{what} changes nothing: check that it is a weight diff for this model")
    check_modules(delta, config, what)


def check_modules(delta: Delta, config: DecoderConfig, what: str, batch: int | None = None) -> None:
    """`check_shapes` for deltas that may change nothing. A module under another name would never be applied.

    Args:
        batch: projections may also hold one change for each of `batch` examples, on axis 1.
    """
    if not isinstance(delta, Mapping):
        raise DitError(
            f"{what} is of type {type(delta).__name__}: a delta is a dict of modules (docs/architecture.md)"
        )
    found: dict[Path, dict[str, tuple[int, ...]]] = {}
    known = all_modules(config)  # a head may be changed apart from the embedding that it is tied to
    for keys, leaf in jax.tree_util.tree_flatten_with_path(delta, is_leaf=_is_empty)[0]:
        names = tuple(str(getattr(key, "key", key)) for key in keys)
        if isinstance(leaf, Mapping) and names not in known:
            continue  # a group without modules
        *parts, name = names
        found.setdefault(tuple(parts), {})[name] = np.shape(leaf)
        kind = getattr(getattr(leaf, "dtype", None), "name", type(leaf).__name__)
        if kind not in FLOATS:
            raise DitError(
                f"{what}: {'.'.join(names)} holds {kind} instead of float arrays of numpy or jax"
            )
    for path, shapes in found.items():
        module = ".".join(path) or min(shapes)
        if path not in known:
            near = did_you_mean(module, map(".".join, sorted(known)))
            raise DitError(
                f"{what} changes {short(module)}, which is no weight of this model{near}"
            )
        weight, lora = known[path].shape, known[path].lora
        lead = (known[path].layers,) if known[path].layers else ()
        if lora and batch is not None and max(map(len, shapes.values())) == 4:
            lead = (*lead, batch)
        wanted = {"w": (*lead, *weight)}
        if "w" not in shapes and lora:
            if set(shapes) == {"a", "b"}:
                raise DitError(
                    f"{what}: {module} has no `scale` beside its factors: put it back "
                    "(dit_jax.deltas.tree.with_scale)"
                )
            rank = shapes.get("b", (0, 0))[-2:-1]
            wanted = {"a": (*lead, weight[0], *rank), "b": (*lead, *rank, weight[1])}
            wanted["scale"] = lead
        if shapes != wanted:
            raise DitError(f"{what}: {module} has the shapes {shapes}, this model needs {wanted}")
        if "b" in shapes:
            check_rank(shapes["b"][-2], weight[0], weight[1], module, what)


def _is_empty(node: Any) -> bool:
    """Whether a node has no leaves, so that flattening would skip it."""
    return node is None or (isinstance(node, Mapping) and not node)


def check_fits(delta: Delta, config: DecoderConfig, what: str) -> None:
    """Raises DitError unless a delta fits this model (see `check_shapes`) and is finite."""
    check_shapes(delta, config, what)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(delta)[0]:
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            name = ".".join(key.key for key in keys)
            raise DitError(f"{what}: {name} holds NaN or infinity: get another diff")


def check_rank(rank: int, inputs: int, outputs: int, name: str, source: object) -> None:
    """Raises DitError for rank 0, and for ranks that no real LoRA has, because they would cost memory."""
    if not 1 <= rank <= max(inputs, outputs) + 1024:
        raise DitError(
            f"'{source}': {short(name)} has the LoRA rank {rank}: expected 1 to "
            f"{max(inputs, outputs)}"
        )
