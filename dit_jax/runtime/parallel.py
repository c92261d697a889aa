"""Distribution: one mesh (data, fsdp, tensor), one table of what is split over it, and host data in and out.

Programs are written for one device. XLA splits them by the shardings of their arguments and by a few `constrain` calls
in the model. Without a mesh every function here does nothing. docs/sharding.md explains the choice.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.errors import DitError, first_line
from dit_jax.runtime.sizes import next_multiple

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of an array -> the mesh axes that it is split over. This table is the only place that says so.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # examples of a batch, or diffs that are finetuned at once
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # of parameters at rest; each layer is gathered where it is used
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
DIFFS = "diffs"  # the axis of `vmap_diffs`; its mesh axes are those of a batch
FREE = PartitionSpec.UNCONSTRAINED  # in `constrain`: the partitioner decides how to split the axis

# ------------------------------------------------------------------ the mesh


# Modes of jax that find mistakes, and take what every model does for one, or take hours.
_REFUSED = {
    "jax_numpy_rank_promotion": ("raise",),
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_transfer_guard": ("disallow", "disallow_explicit"),
    "jax_disable_jit": ("True",),
}
# What random numbers hang on: with another value the same seed would silently give other results.
_WANTED = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": "True",
    "jax_random_seed_offset": "0",
}


def find_devices() -> list[Any]:
    """All devices of all processes. Raises DitError: jax, or this program, cannot use what the environment asks for."""
    if jax.dtypes.canonicalize_dtype("int64") == "int64":
        raise DitError("jax is set to 64 bits, and models here have 32 or 16: unset JAX_ENABLE_X64")
    for name, refused in _REFUSED.items():
        if (value := str(getattr(jax.config, name))) in refused:
            raise DitError(
                f"jax is set to {name}={value}, and under that no model here runs: unset {name.upper()}"
            )
    for name, wanted in _WANTED.items():
        if (value := str(getattr(jax.config, name))) != wanted:
            raise DitError(
                f"jax is set to {name}={value}, with which seeds give other numbers: unset {name.upper()}"
            )
    try:
        default = getattr(jax.config, "jax_default_device")  # noqa: B009
        if isinstance(default, str):
            jax.devices(default)
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # a platform without devices is an assertion
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = f" ({first_line(error)[:200]})" if str(error) else ""
        raise DitError(
            f"jax finds no device for JAX_PLATFORMS={asked!r}{why}: check it, JAX_DEFAULT_DEVICE, XLA_FLAGS and "
            "JAX_NUM_CPU_DEVICES in the environment, or install what it needs (pip install 'dit_jax[gpu]' or "
            "'dit_jax[tpu]')"
        ) from None


class UnplaceableMesh(DitError):
    """A mesh that does not fit the links between the chips of a slice."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of a config's section `mesh`, e.g. {"data": -1, "fsdp": 1, "tensor": 2}; -1 takes what is left.

    Args:
        devices: default all devices of all processes. A single process may leave some of them unused.

    Returns:
        The mesh, or None for one device, where there is nothing to distribute.

    Raises:
        DitError: unknown axes, sizes that are not positive, or that do not fit the number of devices.
        UnplaceableMesh: the links between the chips have no place for these sizes.
    """
    found = list(find_devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(found))
    used = math.prod(shape)
    if used < len(found) and jax.process_count() > 1:
        raise DitError(
            f"mesh {_show(shape)} leaves {len(found) - used} of {len(found)} devices unused: "
            "set one of its axes to -1"
        )
    if used == 1:
        return None
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(shape, MESH_AXES, types, devices=found[:used])
    except NotImplementedError:  # the sides of a torus of chips are fixed
        raise UnplaceableMesh(
            f"mesh {_show(shape)} cannot be laid on the links between these {used} chips: "
            "choose other sizes, such as the sides of the slice and their products"
        ) from None


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the axes from the text "data,fsdp,tensor". Raises DitError: not three numbers."""
    try:
        return dict(zip(MESH_AXES, map(int, text.split(",")), strict=True))
    except ValueError:
        raise DitError(
            f"--mesh {text!r} is not data,fsdp,tensor: write three numbers, e.g. 1,4,4"
        ) from None


def mesh_shape(sizes: Mapping[str, int], count: int) -> tuple[int, int, int]:
    """Sizes of the axes (data, fsdp, tensor) on `count` devices. Raises DitError, see `make_mesh`."""
    unknown = [name for name in sizes if name not in MESH_AXES]
    if unknown:
        raise DitError(f"unknown mesh axis {unknown[0]!r}: the axes are {', '.join(MESH_AXES)}")
    shape = [sizes.get(name, 1) for name in MESH_AXES]
    open_axes = [i for i, size in enumerate(shape) if size == -1]
    whole = all(isinstance(size, int) for size in shape)
    if not whole or len(open_axes) > 1 or any(size < 1 and size != -1 for size in shape):
        raise DitError(
            f"mesh {_show(shape)}: sizes are positive whole numbers, and at most one is -1 (what is left)"
        )
    fixed = math.prod(size for size in shape if size != -1)
    if fixed > count or (open_axes and count % fixed):
        raise DitError(
            f"mesh {_show(shape)} does not divide {count} devices: "
            f"choose axes whose product divides {count}"
        )
    for i in open_axes:
        shape[i] = count // fixed
    return shape[0], shape[1], shape[2]


def describe(mesh: Mesh | None) -> str:
    """Which devices a run uses, for people."""
    kind = jax.devices()[0].device_kind
    if mesh is None:
        return f"device: {kind}"
    return f"mesh {_show(tuple(mesh.shape.values()))}: {mesh.size} of {jax.device_count()} devices ({kind})"


def _show(shape: Sequence[int]) -> str:
    return " × ".join(f"{name} {size}" for name, size in zip(MESH_AXES, shape, strict=True))


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which compiled functions see the mesh. Wrap calls in it, not whole stages."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_shards(mesh: Mesh | AbstractMesh | None) -> int:
    """Into how many parts a batch is split; its size must be a multiple of it."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in RULES["batch"])


def traced_batch_shards() -> int:
    """`batch_shards` of the mesh for which a function is being compiled."""
    mesh = jax.sharding.get_abstract_mesh()
    return batch_shards(None if mesh.empty else mesh)


def round_up(size: int, mesh: Mesh | None) -> int:
    """The next batch size that splits evenly; give added rows weight 0, or drop them from the result."""
    return next_multiple(size, batch_shards(mesh))


# ------------------------------------------------------------------ shardings


def spec(
    mesh: Mesh | AbstractMesh, axes: Sequence[Any], sizes: Sequence[int] | None = None
) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes (a name of `RULES`, None for whole, FREE).

    Args:
        sizes: the sizes of the array's axes; for an axis that consists of uncuttable units (heads) their number.
            An axis that its mesh axes do not divide stays whole.

    Raises:
        ValueError: an unknown name, or two axes of one array on the same mesh axis.
    """
    entries: list[Any] = []
    taken: dict[str, Any] = {}
    for i, axis in enumerate(axes):
        if axis is None or axis is FREE:
            entries.append(axis)
            continue
        if axis not in RULES:
            raise ValueError(f"unknown logical axis {axis!r}: known are {', '.join(RULES)}")
        names = RULES[axis]
        for name in names:
            if name in taken:
                raise ValueError(
                    f"logical axes {taken[name]!r} and {axis!r} of {tuple(axes)} both use {name!r}"
                )
            taken[name] = axis
        ways = math.prod(mesh.shape[name] for name in names)
        if not names or (sizes is not None and sizes[i] % ways):
            entries.append(None)
        else:
            entries.append(names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: Any, units: int | None = None) -> jax.Array:
    """Pins the sharding of an intermediate array inside a compiled function.

    Args:
        axes: a logical axis, None (whole) or FREE for every dimension.
        units: into how many pieces the named axis may be cut at most (heads); default its size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    sizes = x.shape if units is None else (units,) * x.ndim
    return jax.lax.with_sharding_constraint(x, spec(mesh, axes, sizes))


def per_device(
    fn: Callable[..., jax.Array], axes: Sequence[Sequence[Any]], *arrays: jax.Array
) -> jax.Array:
    """fn(*arrays), each device on its own part of the arrays; for kernels that the partitioner cannot split.

    Under `vmap_diffs`, which splits diffs, each diff has its whole batch.

    Args:
        axes: logical axes of each array; an axis that does not divide stays whole. fn returns an array with the shape
            and the axes of the first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn(*arrays)
    mapped = _is_mapped_over_diffs()

    def part(names: Sequence[Any], x: jax.Array) -> PartitionSpec:
        return spec(mesh, [None if mapped and name == "batch" else name for name in names], x.shape)

    specs = tuple(map(part, axes, arrays))
    # Unchecked, because a kernel's result does not say over which axes it varies.
    return jax.shard_map(fn, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def _is_mapped_over_diffs() -> bool:
    try:
        jax.lax.axis_size(DIFFS)
    except NameError:
        return False
    return True


def splits(axis: str, size: int) -> bool:
    """Whether the mesh for which a function is being compiled cuts a logical axis of this size into equal parts."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or size % math.prod(mesh.shape[name] for name in RULES[axis]) == 0


def replicate(tree: Any) -> Any:
    """Inside a compiled function: results as a whole copy on each device, so that every process can read them."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def spmd_axes() -> tuple[str, ...] | None:
    """Inside a compiled function: the mesh axes of a batch, for `jax.vmap(spmd_axis_name=…)` over it."""
    return None if jax.sharding.get_abstract_mesh().empty else RULES["batch"]


def vmap_diffs(fn: Callable[..., Any], in_axes: Any = 0) -> Callable[..., Any]:
    """Inside a compiled function: `jax.vmap` over diffs, each computed on one part of the mesh."""
    return jax.vmap(fn, in_axes, axis_name=DIFFS, spmd_axis_name=spmd_axes())


# ------------------------------------------------------------------ host data to devices and back


def put(host: Any, sharding: Any) -> jax.Array:
    """A host array that every process holds whole, as one global array; each device gets only its part."""
    if isinstance(host, jax.Array):
        if host.sharding == sharding:
            return host
        host = to_host(host)
    host = np.asarray(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Sharding of an array whose dimension `axis` is the batch, the others whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, RULES["batch"]))


def local_rows(mesh: Mesh | None, size: int) -> list[int]:
    """Which of a batch's `size` rows this process supplies to `put_rows`, in order."""
    if mesh is None:
        return list(range(size))
    parts: Any = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(size))})


def put_rows(tree: Any, mesh: Mesh | None, size: int, shardings: Any = None, axis: int = 0) -> Any:
    """Host arrays with this process's rows of a batch (`local_rows`), as global arrays.

    Args:
        size: of the whole batch, on dimension `axis`.
        shardings: a tree like `tree`; default: only the batch is split.
    """
    if mesh is None:
        return tree
    if shardings is None:
        shardings = jax.tree.map(lambda _: batch_sharding(mesh, axis), tree)

    def one(local: Any, sharding: Any) -> jax.Array:
        local = np.asarray(local)
        shape = (*local.shape[:axis], size, *local.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    return jax.tree.map(one, tree, shardings)


def to_host(tree: Any) -> Any:
    """Whole numpy arrays on every process; all processes must call it."""
    return jax.tree.map(_to_host, tree)


def _to_host(x: Any) -> np.ndarray:
    if _is_split(x):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def host_blocks(x: Any) -> Iterator[np.ndarray]:
    """An array in consecutive pieces, whole rows of its first axis, so that no device must hold all of a parameter."""
    if _is_split(x) and x.ndim > 2:
        for row in range(x.shape[0]):
            yield _to_host(x[row])
    else:
        yield _to_host(x)


def _is_split(x: Any) -> bool:
    """Whether other processes hold parts of an array that this one does not have."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
