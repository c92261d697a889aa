"""The best approximation of a delta by a LoRA of a given rank, and how much of its squared norm that keeps."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dit_jax.deltas.factors import Factors, get_factors, modules, stack_factors
from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import Path, all_modules, get_at, set_at

Change = Callable[[Path, int | None], np.ndarray | Factors]


def check_svd_rank(rank: int, config: DecoderConfig) -> None:
    """Raises DitError for a rank below 1, or one that no projection can have."""
    most = max(min(module.shape) for module in all_modules(config).values() if module.lora)
    if not 1 <= rank <= most:
        raise DitError(f"the rank of the SVD must be from 1 to {most}, not {rank}")


def best_rank(change: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best approximation a @ b of a matrix [in, out], with a: [in, r] and b: [r, out], and its energy.

    It comes from the eigenvectors of the smaller Gram matrix in float64. The factors are float32. Energy is the squared
    Frobenius norm.
    """
    wide = change.astype(np.float64)
    rank = min(rank, *wide.shape)
    tall = wide.shape[0] > wide.shape[1]
    values, vectors = np.linalg.eigh(wide.T @ wide if tall else wide @ wide.T)
    top = vectors[:, ::-1][:, :rank]
    a, b = (wide @ top, top.T) if tall else (top, top.T @ wide)
    energy = float(np.clip(values[::-1][:rank], 0, None).sum())
    with np.errstate(over="ignore"):
        return a.astype(np.float32), np.ascontiguousarray(b, np.float32), energy


def truncate(
    paths: Iterable[Path], change: Change, rank: int, config: DecoderConfig, source: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A LoRA delta on the projections, and the share of the squared norm that it keeps.

    Args:
        paths: the modules that change.
        change: the change of a module in a layer, dense or as factors. One is in memory at a time.

    Returns:
        (delta, {"svd": …}), see docs/formats.md.
    """
    table, layers = all_modules(config), config.num_hidden_layers
    # The last entry is for modules outside the layers.
    total, kept = np.zeros(layers + 1), np.zeros(layers + 1)
    per_module: dict[str, list[float]] = {}
    delta: dict[str, Any] = {}
    for path in paths:
        factors: dict[tuple[Path, int], Callable[[], Factors]] = {}
        shares = []
        for layer in table[path].indices:
            outer, core = _split(change(path, layer))
            slot = layers if layer is None else layer
            energy = float(np.square(core, dtype=np.float64).sum())
            total[slot] += energy
            captured = 0.0
            if energy and layer is not None and table[path].lora:
                a, b, captured = best_rank(core, rank)
                kept[slot] += captured
                if outer is not None:
                    a, b = (outer[0] @ a).astype(np.float32), (b @ outer[1]).astype(np.float32)
                if not (np.isfinite(a).all() and np.isfinite(b).all()):
                    raise DitError(
                        f"'{source}' changes {path[-1]} by more than the factors of a LoRA can hold: leave out the "
                        "rank of the SVD, or get another diff"
                    )
                factors[path, layer] = lambda a=a, b=b: Factors(a, b, 1.0)  # type: ignore[misc]
            shares.append(_share(captured, energy))
        per_module[".".join(path)] = shares
        if factors:
            tree = stack_factors(factors, config, source)
            set_at(delta, path, dict(modules(tree))[path])
    report = {
        "rank": rank,
        "captured_energy": _share(kept.sum(), total.sum()),
        "captured_energy_per_layer": [
            _share(k, t) for k, t in zip(kept[:-1], total[:-1], strict=True)
        ],
        "captured_energy_per_module": per_module,
    }
    return delta, {"svd": report}


def truncate_delta(
    delta: Any, rank: int, config: DecoderConfig, source: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`truncate` of a delta tree, numpy: LoRA factors, dense differences, or both."""

    def change(path: Path, layer: int | None) -> np.ndarray | Factors:
        module = get_at(delta, path)
        if "w" in module:
            return np.asarray(module["w"] if layer is None else module["w"][layer])
        assert layer is not None  # factors are those of projections
        return get_factors(module, layer)

    return truncate([path for path, _ in modules(delta)], change, rank, config, source)


def _split(
    change: np.ndarray | Factors,
) -> tuple[tuple[np.ndarray, np.ndarray] | None, np.ndarray]:
    """(outer, core) of a change: a dense one is its own core; scale * a b is outer[0] @ core @ outer[1].

    The outer matrices are orthonormal, so the small core [r, r] has the singular values of the whole product.
    """
    if isinstance(change, np.ndarray):
        return None, change
    left, a = np.linalg.qr(change.a.astype(np.float64))
    right, b = np.linalg.qr(change.b.astype(np.float64).T)
    return (left, right.T), change.scale * (a @ b.T)


def _share(part: float, whole: float) -> float:
    """part / whole, or 1 where there is nothing to capture."""
    return min(1.0, float(part) / float(whole)) if whole else 1.0
