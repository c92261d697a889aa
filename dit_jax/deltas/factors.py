"""LoRA factors of single modules: joined to a delta tree, and taken from one (numpy)."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats import budgets
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import map_modules
from dit_jax.models.modules import Path, all_modules, set_at
from dit_jax.runtime.sizes import next_power


@dataclasses.dataclass
class Factors:
    """LoRA factors of one module of one layer: y += scale * (x a) b, a [in, r], b [r, out]."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that all have. A mixture gives float32, or float64 if that is one of them."""
    kinds = list(dict.fromkeys(np.dtype(d) for d in dtypes))
    if len(kinds) == 1:
        return kinds[0]
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)


def stack_factors(
    found: dict[tuple[Path, int], Callable[[], Factors]], config: DecoderConfig, source: object
) -> dict[str, Any]:
    """A LoRA delta from the factors of single modules, which are read one after the other.

    Layers without factors get zeros. Smaller ranks are padded with zeros to the largest rank of the projection, which
    changes nothing.

    Raises:
        DitError: nothing was found, the padding would take far more memory than the factors, or see what reads a
            module.
    """
    if not found:
        raise DitError(
            f"'{source}' changes no module of this model: check that it is a weight diff for it"
        )
    delta: dict[str, Any] = {}
    held = padded = 0
    for path in dict.fromkeys(path for path, _ in found):
        layers = {layer: read() for (p, layer), read in found.items() if p == path}
        sizes = {layer: f.a.nbytes + f.b.nbytes for layer, f in layers.items()}
        held += sum(sizes.values())
        padded += config.num_hidden_layers * max(sizes.values())
        if padded > budgets.held_bytes(held):
            largest = layers[max(sizes, key=sizes.__getitem__)].a.shape[1]
            raise DitError(
                f"'{source}': the LoRA rank {largest} of one layer's {path[-1]} would take {padded >> 20} MB in all "
                f"layers, whose factors have {held >> 20} MB: split it, or train one rank for all layers"
            )
        set_at(delta, path, _stack(layers, path, config))
    return delta


def _stack(layers: dict[int, Factors], path: Path, config: DecoderConfig) -> dict[str, np.ndarray]:
    inputs, outputs = all_modules(config)[path].shape
    size = config.num_hidden_layers
    rank = max(f.a.shape[1] for f in layers.values())
    dtype = common_dtype(array.dtype for f in layers.values() for array in (f.a, f.b))
    a, b = np.zeros((size, inputs, rank), dtype), np.zeros((size, rank, outputs), dtype)
    # A layer without factors gets the scale of the others, so that a uniform scale stays uniform.
    scale = np.full(size, next(iter(layers.values())).scale, np.float32)
    for layer, factors in layers.items():
        r = factors.a.shape[1]
        a[layer, :, :r], b[layer, :r], scale[layer] = factors.a, factors.b, factors.scale
    return {"a": a, "b": b, "scale": scale}


def stack_padded(deltas: Sequence[Any]) -> dict[str, Any]:
    """LoRA deltas of any ranks and modules as one tree, leaves [n, L, …].

    Zeros fill up ranks and missing modules, which changes nothing. The rank of a module is the largest one, rounded up
    to a power of two, so that few programs are compiled. A mixture of dtypes becomes float32.
    """
    own = [dict(modules(delta)) for delta in deltas]
    stacked: dict[str, Any] = {}
    for path in dict.fromkeys(path for one in own for path in one):
        known = [one[path] for one in own if path in one]
        (layers, inputs, _), outputs = known[0]["a"].shape, known[0]["b"].shape[-1]
        rank = next_power(max(module["a"].shape[-1] for module in known))
        dtype = common_dtype(module[name].dtype for module in known for name in ("a", "b"))
        a = np.zeros((len(own), layers, inputs, rank), dtype)
        b = np.zeros((len(own), layers, rank, outputs), dtype)
        scale = np.ones((len(own), layers), np.float32)
        for row, one in enumerate(own):
            if path in one:
                r = one[path]["a"].shape[-1]
                a[row, :, :, :r], b[row, :, :r] = one[path]["a"], one[path]["b"]
                scale[row] = one[path]["scale"]
        set_at(stacked, path, {"a": a, "b": b, "scale": scale})
    return stacked


def add_once(found: dict[Any, Any], key: Any, value: Any, name: str, source: object) -> None:
    """Sets found[key]. Raises DitError if two names mean the same module."""
    if key in found:
        raise DitError(f"'{source}' changes {short(name)} twice, under two names: fix the file")
    found[key] = value


def modules(delta: Any, path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(path, module) of every module of a delta tree: a dict with `w`, or with `a`, `b` and `scale`."""
    if path and ("w" in delta or "a" in delta):
        yield path, delta
        return
    for name, child in delta.items():
        yield from modules(child, (*path, name))


def changes_nothing(delta: Any) -> bool:
    """Whether every change of a delta is zero: a factor of each LoRA, or its scale, and each dense difference."""
    for _, module in modules(delta):
        if "w" in module:
            if np.any(module["w"]):
                return False
            continue
        a, b, scale = (np.asarray(module[name]) for name in ("a", "b", "scale"))
        layers = a.any(axis=(1, 2)) & b.any(axis=(1, 2)) & (scale != 0)
        if layers.any():
            return False
    return True


def get_factors(module: dict[str, Any], layer: int, *, trim: bool = False) -> Factors:
    """The factors of one layer; `trim` drops trailing ranks that are zero in both."""
    a, b = np.asarray(module["a"][layer]), np.asarray(module["b"][layer])
    if trim:
        used = np.flatnonzero((a != 0).any(axis=0) | (b != 0).any(axis=1))
        rank = int(used[-1]) + 1 if used.size else 0
        a, b = a[:, :rank], b[:rank]
    return Factors(a, b, float(np.float32(module["scale"][layer])))


def fold(array: np.ndarray, factor: float) -> np.ndarray:
    """array * factor, in the array's dtype if it is exact there, else in float32. Raises DitError: it overflows."""
    if factor == 1:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        product = array.astype(np.float32) * np.float32(factor)
        narrow = product.astype(array.dtype)
    if not np.isfinite(product).all():
        raise DitError("a factor of a LoRA overflows with its scale: check that (lora_alpha)")
    return narrow if np.array_equal(narrow.astype(np.float32), product) else product


def fuse(*deltas: Any) -> dict[str, Any]:
    """One LoRA delta that equals the sum of several: joined along the rank, with all scales 1.

    Scales are folded into `b`. The result is float32 where this or a mixture of dtypes is not exact in the stored
    dtype.

    Raises:
        DitError: a delta has dense parts, which have no rank to join, or no delta changes anything.
    """
    parts: dict[Path, list[dict[str, Any]]] = {}
    for delta in deltas:
        for path, module in modules(delta):
            if "w" in module:
                raise DitError(
                    f"{'.'.join(path)} is a dense difference: only LoRA deltas can be fused (use a "
                    "truncated SVD of the finetuned model)"
                )
            parts.setdefault(path, []).append(module)
    if not parts:
        raise DitError("there is nothing to fuse, the deltas are empty: check them")
    fused: dict[str, Any] = {}
    for path, members in parts.items():
        scaled = [_unit_scale(member) for member in members]
        dtype = common_dtype(array.dtype for pair in scaled for array in pair)
        a = np.concatenate([pair[0].astype(dtype) for pair in scaled], axis=-1)
        b = np.concatenate([pair[1].astype(dtype) for pair in scaled], axis=-2)
        module = {"a": a, "b": b, "scale": np.ones(a.shape[0], np.float32)}
        set_at(fused, path, module)
    return fused


def _unit_scale(module: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    b, scale = np.asarray(module["b"]), np.asarray(module["scale"], np.float32)
    folded = [fold(b[layer], float(s)) for layer, s in enumerate(scale)]
    dtype = common_dtype(array.dtype for array in folded)
    return np.asarray(module["a"]), np.stack([array.astype(dtype) for array in folded])


def rounded(delta: Any, dtype: Any) -> Any:
    """A delta whose factors and differences have this dtype; scales keep theirs."""

    def round_module(_: Path, module: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: leaf if name == "scale" else np.asarray(leaf).astype(dtype)
            for name, leaf in module.items()
        }

    return map_modules(round_module, delta)


def squares(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Σx² over axes, which stay with size 1; in float64 where the squares of float32 overflow or vanish."""
    most = float(np.abs(x).max(initial=0))
    wide = np.float32 if 1e-12 < most < 1e12 else np.float64
    total: np.ndarray = np.square(x.astype(wide)).sum(axes, keepdims=True)
    return total


def moments(module: Any, in_layers: bool) -> tuple[np.ndarray, np.ndarray]:
    """Σσ² and Σσ⁴ of each matrix of a module, from Gram matrices: no singular values are computed."""
    if "w" in module:
        w = np.asarray(module["w"], np.float32)
        squares, fourths = [], []
        for matrix in w if in_layers else w[None]:
            matrix = np.atleast_2d(matrix)
            # Squares of float32 may overflow or vanish.
            unit = float(np.abs(matrix).max(initial=0)) or 1.0
            matrix = matrix / np.float32(unit)
            gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
            squares.append(float(np.trace(gram)) * unit**2)
            fourths.append(float(np.square(gram, dtype=np.float64).sum()) * unit**4)
        return np.asarray(squares), np.asarray(fourths)
    a, b = (np.asarray(module[name], np.float64) for name in ("a", "b"))
    a = a * np.asarray(module["scale"], np.float64)[:, None, None]
    product = (a.swapaxes(1, 2) @ a) @ (b @ b.swapaxes(1, 2))  # [L, r, r]
    squares = np.trace(product, axis1=1, axis2=2)
    return squares, np.trace(product @ product, axis1=1, axis2=2)
