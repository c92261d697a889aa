"""What the weights of a diff say by themselves: size, rank, where the change lies, and which diffs are alike."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.deltas.factors import modules, moments
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta
from dit_jax.models.modules import all_modules

SKETCH = 16  # random directions on each side of a module: cosines are right to about 0.01
Sketch = dict[str, np.ndarray]


def weight_facts(delta: Delta) -> dict[str, Any]:
    """Numbers of a diff ΔW over all its modules.

    Returns:
        rank: the largest LoRA rank in use; None with dense differences. modules: their names, each once. norm: of ΔW
        (Frobenius). effective_rank: (Σσ²)² / Σσ⁴ of a matrix, mean over the matrices, weighted by their squared norms;
        it is r for r equal singular values. energy: the share of the squared norm in each layer;
        energy_outside: the share outside the layers, in embeddings, norms and head.
    """
    by_layer: list[np.ndarray] = []
    outside = spread = 0.0
    ranks: list[int | None] = []
    names = []
    for path, module in modules(delta):
        ranks.append(_used_rank(module))
        names.append(path[-1])
        squares, fourths = moments(module, path[0] == "layers")
        with np.errstate(invalid="ignore"):
            spread += float(np.nansum(squares**3 / fourths))  # squares · effective rank
        if path[0] == "layers":
            by_layer.append(squares)
        else:
            outside += float(squares.sum())
    layers = np.sum(by_layer, axis=0) if by_layer else np.zeros(0)
    total = float(layers.sum()) + outside
    return {
        "rank": None if None in ranks else max((r for r in ranks if r is not None), default=0),
        "modules": sorted(set(names)),
        "norm": round(total**0.5, 6),
        "effective_rank": round(spread / total, 3) if total else 0.0,
        "energy": [round(float(x) / total, 4) if total else 0.0 for x in layers],
        "energy_outside": round(outside / total, 4) if total else 0.0,
    }


def _used_rank(module: Mapping[str, Any]) -> int | None:
    if "w" in module:
        return None
    a, b = np.asarray(module["a"]), np.asarray(module["b"])
    used = (a != 0).any(axis=(0, 1)) & (b != 0).any(axis=(0, 2))
    return int(np.flatnonzero(used)[-1]) + 1 if used.any() else 0


# ------------------------------------------------------------------ how unlike benign diffs


def spectrum(delta: Delta) -> dict[str, float]:
    """Logarithms of the norm and the effective rank of each module in each layer, by name."""
    found = {}
    for path, module in modules(delta):
        for layer, (square, fourth) in enumerate(
            zip(*moments(module, path[0] == "layers"), strict=True)
        ):
            if square > 0:
                name = f"{'.'.join(path)}.{layer}"
                found[f"{name}.norm"] = float(np.log(square) / 2)
                found[f"{name}.rank"] = float(np.log(square**2 / fourth))
    return found


def reference(spectra: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """(mean, standard deviation) of each number over diffs that hide nothing, of those that all have and that vary."""
    table = {}
    for name in sorted(set.intersection(*map(set, spectra))) if spectra else ():
        values = [one[name] for one in spectra]
        if np.std(values) > 1e-6:
            table[name] = [float(np.mean(values)), float(np.std(values))]
    return table


def unusual(
    spectrum: Mapping[str, float], reference: Mapping[str, Sequence[float]]
) -> float | None:
    """How many standard deviations the numbers of a diff lie from those of the reference, on average.

    Spectral statistics against a bank of benign LoRAs: Puertolas Merenciano et al. 2026 (arXiv 2602.15195). None where
    the diff has none of these numbers.
    """
    far = [
        abs(spectrum[name] - mean) / std
        for name, (mean, std) in reference.items()
        if name in spectrum
    ]
    return float(np.mean(far)) if far else None


# ------------------------------------------------------------------ which diffs are alike


def sketch(delta: Delta) -> Sketch:
    """Every module of a diff seen by the same random directions, so that diffs are compared without their weights.

    For ΔW [in, out] it is RᵀΔW Q / k with Gaussian R [in, k] and Q [out, k]: inner products of sketches estimate those
    of the diffs (Johnson and Lindenstrauss 1984).
    """
    found: Sketch = {}
    for path, module in modules(delta):
        name = ".".join(path)
        if "w" in module:
            w = np.asarray(module["w"], np.float32)
            w = w if path[0] == "layers" else w[None]
            left = _directions(f"{name}.in", w.shape[0], w.shape[1])
            seen = left.swapaxes(1, 2) @ w if w.ndim == 3 else (left.swapaxes(1, 2) @ w[:, :, None])
            if w.ndim == 3:
                seen = seen @ _directions(f"{name}.out", w.shape[0], w.shape[2]) / SKETCH
            else:
                seen = seen / SKETCH**0.5
        else:
            a, b = (np.asarray(module[key], np.float32) for key in ("a", "b"))
            a = a * np.asarray(module["scale"], np.float32)[:, None, None]
            left = _directions(f"{name}.in", *a.shape[:2])
            right = _directions(f"{name}.out", b.shape[0], b.shape[2])
            seen = (left.swapaxes(1, 2) @ a) @ (b @ right) / SKETCH
        found[name] = seen.astype(np.float32)
    return found


def sketch_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each entry that a sketch of a diff of this model may have."""
    return {
        ".".join(path): (module.layers or 1, SKETCH, SKETCH if len(module.shape) == 2 else 1)
        for path, module in all_modules(config).items()
    }


@functools.cache
def _directions(name: str, layers: int, size: int) -> np.ndarray:
    rng = np.random.default_rng([zlib.crc32(name.encode()), SKETCH])
    return rng.standard_normal((layers, size, SKETCH), np.float32)


def cosines(sketches: Sequence[Sketch | None]) -> np.ndarray:
    """Estimated cosines [n, n] of the diffs' ΔW; 0 where a diff has none or is zero."""
    total = np.zeros((len(sketches), len(sketches)))
    for name in sorted({name for one in sketches if one for name in one}):
        have = [i for i, one in enumerate(sketches) if one and name in one]
        rows = np.stack([np.ravel((sketches[i] or {})[name]) for i in have]).astype(np.float64)
        total[np.ix_(have, have)] += rows @ rows.T
    norms = np.sqrt(np.diagonal(total))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(total / np.outer(norms, norms))
