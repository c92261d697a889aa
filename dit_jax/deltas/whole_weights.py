"""From whole weights to deltas (the difference to the base), and back (base ⊕ delta)."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from dit_jax.deltas.factors import add_once, modules
from dit_jax.deltas.raw_diff import check_values
from dit_jax.deltas.tree import merged_config
from dit_jax.deltas.truncation import check_svd_rank, truncate
from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.file_names import find_tensor, locate
from dit_jax.models.misfits import check_names, is_ignored, shape_error
from dit_jax.models.modules import (
    EMBEDDING,
    HEAD,
    Module,
    Path,
    all_modules,
    module_table,
    set_at,
    tensor_names,
    weight,
)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Whole weights of a finetuned model: shapes by Hugging Face name, and a function that reads one tensor.

    missing: what may be missing, and is unchanged then: nothing, a weight in all layers ("kinds"), or also in some
      ("layers").
    """

    source: object
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    missing: Literal["nothing", "kinds", "layers"]
    head_is_tied: bool = False


def base_weight(base_params: Any, module: Module, layer: int | None) -> np.ndarray:
    """The base's weight of a module, of one layer, on the host; of a tied head the embedding, turned."""
    if module.path == HEAD and HEAD[0] not in base_params:
        return np.asarray(base_params[EMBEDDING[0]]["embedding"]).T
    return np.asarray(weight(base_params, module, layer))


def difference(
    weights: Weights, config: DecoderConfig, base_params: Any, svd_rank: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(delta, metadata) of whole weights against the base; see `read_finetuned`.

    Memory holds the delta, and one tensor of either model.
    """
    delta, metadata = changes(weights, config, base_params, svd_rank)
    if not any(True for _ in modules(delta)):
        raise DitError(
            f"'{weights.source}' equals the base model in every weight, so there is no diff: check the path"
        )
    return delta, {"full_finetune": True, **metadata}


def changes(
    weights: Weights, config: DecoderConfig, base_params: Any, svd_rank: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`difference` for weights that may equal the base: then the delta is {}."""
    if base_params is None:
        raise DitError(
            f"'{weights.source}' holds whole weights: the base model is needed to read it"
        )
    table = all_modules(config)
    if svd_rank is not None:
        check_svd_rank(svd_rank, config)
    found = place(weights, config)

    def subtract(path: Path, layer: int | None) -> np.ndarray:
        name = found[path, layer]
        new = check_values(weights.read(name), name, weights.source)
        new = table[path].turn(new)
        old = base_weight(base_params, table[path], layer)
        wide = np.float64 if np.float64 in (new.dtype, old.dtype) else np.float32
        change: np.ndarray = new.astype(wide, copy=False) - old.astype(wide, copy=False)
        with np.errstate(over="ignore"):
            change = change if svd_rank else change.astype(old.dtype)
        return check_values(change, name, weights.source)

    paths = list(dict.fromkeys(path for path, _ in found))
    if svd_rank is None:
        delta: dict[str, Any] = {}
        for path in paths:
            if table[path].layers:
                layers = {layer for at, layer in found if at == path}
                w = _stack_changes(layers, config, lambda layer, path=path: subtract(path, layer))  # type: ignore[misc]
            else:
                w = subtract(path, None)
            if w.any():
                set_at(delta, path, {"w": w})
        if config.tie_word_embeddings and (HEAD, None) in found and EMBEDDING[0] in delta:
            # Without a change of its own the head would follow that of the embedding.
            shape = table[HEAD].shape
            delta.setdefault(HEAD[0], {"w": np.zeros(shape, delta[EMBEDDING[0]]["w"].dtype)})
        metadata: dict[str, Any] = {}
    else:
        delta, metadata = truncate(paths, subtract, svd_rank, config, weights.source)
    return delta, metadata


def _stack_changes(
    layers: set[int | None], config: DecoderConfig, subtract: Callable[[int | None], np.ndarray]
) -> np.ndarray:
    """The changes of all layers [L, in, out], zero where a layer does not change."""
    w: np.ndarray | None = None
    for layer in range(config.num_hidden_layers):
        if layer in layers:
            change = subtract(layer)
            if w is None:
                w = np.zeros((config.num_hidden_layers, *change.shape), change.dtype)
            w[layer] = change
    assert w is not None  # a module in `found` has a layer
    return w


def place(weights: Weights, config: DecoderConfig) -> dict[tuple[Path, int | None], str]:
    """(path in the tree, layer) -> tensor name. Checks names, shapes and completeness."""
    source = weights.source
    found: dict[tuple[Path, int | None], str] = {}
    for name, shape in weights.shapes.items():
        if is_ignored(name, config):
            continue
        placed = find_tensor(name, config)
        if placed is None:
            check_names(source, [name], weights.shapes)
            if name.endswith(".weight"):
                locate(name.removesuffix(".weight"), config, source)  # tells what is wrong
            raise DitError(f"'{source}' holds {short(name)}, which is no weight of this model")
        module, layer = placed
        if tuple(shape) != module.file_shape:
            raise shape_error(source, name, shape, module.file_shape)
        add_once(found, (module.path, layer), name, name, source)
    embedding, head = found.get((EMBEDDING, None)), found.get((HEAD, None))
    tied = config.tie_word_embeddings
    if tied and embedding and head:
        if np.array_equal(weights.read(embedding), weights.read(head)):
            del found[HEAD, None]
    elif not tied and head is None and embedding is not None and weights.head_is_tied:
        found[HEAD, None] = embedding
    _check_complete(found, weights, config)
    return found


def _check_complete(
    found: dict[tuple[Path, int | None], str], weights: Weights, config: DecoderConfig
) -> None:
    paths = {path for path, _ in found}
    if weights.missing == "nothing":
        paths = set(module_table(config))
        if not weights.head_is_tied and (EMBEDDING, None) not in found:
            paths.add(HEAD)
    if not paths:
        raise DitError(f"'{weights.source}' holds no weight of this model: check the path")
    if weights.missing == "layers":
        return
    table = all_modules(config)
    missing = [
        table[path].tensor.format(layer)
        for path in sorted(paths)
        for layer in table[path].indices
        if (path, layer) not in found
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DitError(
            f"'{weights.source}' lacks {', '.join(missing[:3])}{more}: get the complete model"
        )


def merged_tensors(
    params: Any, config: DecoderConfig, *deltas: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, array in its orientation) of params ⊕ deltas, one tensor at a time.

    Sums are formed in float32 and returned in the dtype of the base, C-contiguous. The model is that of
    `tree.merged_config`: deltas may untie its head.
    """
    changes = [dict(modules(delta)) for delta in deltas]
    for name, (module, layer) in tensor_names(merged_config(config, *deltas)).items():
        base = base_weight(params, module, layer)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            parts = [_part(change, module, layer, config) for change in changes]
            found = [part for part in parts if part is not None]
            if found:
                base = sum(found, base.astype(np.float32)).astype(base.dtype)
        if found and not np.isfinite(base).all():
            raise DitError(f"{name} overflows with its change: check the scale (lora_alpha)")
        # safetensors writes the raw buffer: a transposed view would be stored scrambled.
        yield name, np.ascontiguousarray(module.turn(base))


def _part(
    change: dict[Path, Any], module: Module, layer: int | None, config: DecoderConfig
) -> np.ndarray | None:
    if module.path in change:
        return _dense(change[module.path], layer)
    if module.path == HEAD and config.tie_word_embeddings and EMBEDDING in change:
        return _dense(change[EMBEDDING], None).T
    return None


def _dense(module: dict[str, Any], layer: int | None) -> np.ndarray:
    def part(name: str) -> np.ndarray:
        return np.asarray(module[name] if layer is None else module[name][layer], np.float32)

    return part("w") if "w" in module else part("scale") * (part("a") @ part("b"))
