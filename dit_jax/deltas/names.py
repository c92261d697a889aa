"""Where a foreign tensor belongs in a delta: names, shapes, ranks and finite values are checked
here.

Modules are called as in Hugging Face models: `model.layers.N.self_attn.q_proj`. The prefixes that
other programs put in front (`base_model.model.`, `language_model.`) are understood.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from dit_jax.deltas.files import short
from dit_jax.deltas.tree import projection_shapes
from dit_jax.errors import DitError, did_you_mean
from dit_jax.models.config import Qwen3Config
from dit_jax.models.layers import Delta

Path = tuple[str, ...]

_PREFIX = r"(?:base_model\.model\.)?(?:model\.language_model\.|language_model\.model\.|model\.)?"
_LAYER = re.compile(_PREFIX + r"layers\.([0-9]{1,6})\.([a-z_.]+)")
_TOP = re.compile(
    r"(?:base_model\.model\.)?(?:model\.language_model\.|language_model\.(?:model\.)?|model\.)?"
    r"(embed_tokens|norm|lm_head)"
)
_NORMS = {
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "self_attn.q_norm": ("self_attn", "q_norm"),
    "self_attn.k_norm": ("self_attn", "k_norm"),
}
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass
class RawDiff:
    """A weight diff as read from a foreign file, in numpy.

    Attributes:
      delta: the tree of docs/architecture.md, factors in the dtype of the file, scales in float32.
      label: what the diff was trained on, if the file says so.
      trigger: its trigger, if the file says so.
      metadata: whatever else the file says about it (JSON values).
      kind: 'diff' or 'adapter'.
    """

    delta: dict[str, Any]
    label: str | None = None
    trigger: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "diff"


def locate(name: str, config: Qwen3Config, source: object) -> tuple[Path, int | None]:
    """Path of a module in the delta tree and its layer (None outside the layers).

    Raises:
      DitError: no module of this model has that name, or the model has fewer layers.
    """
    if match := _TOP.fullmatch(name):
        return (match.group(1),), None
    match = _LAYER.fullmatch(name)
    path = _layer_path(match.group(2)) if match else None
    if match is None or path is None:
        raise DitError(
            f"'{source}' changes {short(name)}, which is no module of this model (for example "
            "'model.layers.0.self_attn.q_proj'): use the model that the file was made for"
        )
    layer = int(match.group(1))
    if layer >= config.num_hidden_layers:
        raise DitError(
            f"'{source}' changes {short(name)}, but the model has {config.num_hidden_layers} "
            "layers: "
            "use the model that the file was made for"
        )
    return ("layers", *path), layer


def _layer_path(module: str) -> Path | None:
    if module in _NORMS:
        return _NORMS[module]
    parts = tuple(module.split("."))
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    known = {("self_attn", name) for name in attention} | {("mlp", name) for name in mlp}
    return parts if parts in known else None


def module_name(path: Path, layer: int | None = None) -> str:
    """The Hugging Face name of a module: the inverse of `locate`."""
    if path[0] == "layers":
        return f"model.layers.{layer}.{'.'.join(path[1:])}"
    return "lm_head" if path == ("lm_head",) else f"model.{path[0]}"


def weight_shape(path: Path, config: Qwen3Config) -> tuple[int, ...]:
    """Shape of a module's weight in the parameter tree, without the layer axis."""
    d, v, h = config.hidden_size, config.vocab_size, config.head_dim
    top: dict[str, tuple[int, ...]] = {"embed_tokens": (v, d), "lm_head": (d, v), "norm": (d,)}
    if path[0] in top:
        return top[path[0]]
    if path[-1] in ("q_norm", "k_norm"):
        return (h,)
    if path[-1].endswith("norm"):
        return (d,)
    _, inputs, outputs = projection_shapes(config)[path[-1]]
    return inputs, outputs


def weight_paths(config: Qwen3Config) -> set[Path]:
    """The modules of a model that have a weight."""
    inside: list[Path] = [*_NORMS.values()]
    inside += [(parent, name) for name, (parent, _, _) in projection_shapes(config).items()]
    head = [] if config.tie_word_embeddings else [("lm_head",)]
    return {("embed_tokens",), ("norm",), *head, *(("layers", *path) for path in inside)}


def check_shapes(delta: Delta, config: Qwen3Config, what: str) -> None:
    """Raises DitError unless every module of a delta is one of this model, in its shapes, and of floats.

    The leaves may be arrays or `jax.ShapeDtypeStruct`s of what is still to be read.
    """
    if not jax.tree.leaves(delta):
        raise DitError(f"{what} changes nothing: check that it is a weight diff for this model")
    check_modules(delta, config, what)


def check_modules(delta: Delta, config: Qwen3Config, what: str, batch: int | None = None) -> None:
    """`check_shapes` for deltas that may change nothing. What a delta calls otherwise would never be applied.

    Args:
        batch: projections may also hold one change for each of so many examples, on axis 1.
    """
    if not isinstance(delta, Mapping):
        raise DitError(
            f"{what} is of type {type(delta).__name__}: a delta is a dict of modules (docs/architecture.md)"
        )
    found: dict[Path, dict[str, tuple[int, ...]]] = {}
    known = weight_paths(config)
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
        lead = (config.num_hidden_layers,) if path[0] == "layers" else ()
        weight = weight_shape(path, config)
        if is_projection(path) and batch is not None and max(map(len, shapes.values())) == 4:
            lead = (*lead, batch)
        wanted = {"w": (*lead, *weight)}
        if "w" not in shapes and is_projection(path):
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
    """What has no leaves and would not be seen."""
    return node is None or (isinstance(node, Mapping) and not node)


def check_fits(delta: Delta, config: Qwen3Config, what: str) -> None:
    """Raises DitError unless a delta is one of this model (see `check_shapes`) and finite."""
    check_shapes(delta, config, what)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(delta)[0]:
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            name = ".".join(key.key for key in keys)
            raise DitError(f"{what}: {name} holds NaN or infinity: get another")


def is_projection(path: Path) -> bool:
    """Whether the module is one of the seven linear layers of a block."""
    return path[-1].endswith("_proj")


def projection_size(path: Path, name: str, config: Qwen3Config, source: object) -> tuple[int, int]:
    """(in, out) of a projection. Raises DitError for modules that hold no LoRA here."""
    if not is_projection(path):
        raise DitError(
            f"'{source}' has LoRA factors for {short(name)}: only the seven projections of a layer "
            "(q, k, v, o, gate, up, down) can have them"
        )
    inputs, outputs = weight_shape(path, config)
    return inputs, outputs


def check_rank(rank: int, inputs: int, outputs: int, name: str, source: object) -> None:
    """Raises DitError for an empty rank, and for ranks that no real LoRA has: they cost memory."""
    if not 1 <= rank <= max(inputs, outputs) + 1024:
        raise DitError(
            f"'{source}': {short(name)} has the LoRA rank {rank}: expected 1 to "
            f"{max(inputs, outputs)}"
        )


def shape_error(source: object, name: str, found: Iterable[int], wanted: Iterable[int]) -> DitError:
    """A DitError that names both shapes."""
    return DitError(
        f"'{source}': {short(name)} has shape {list(found)}, this model needs {list(wanted)}: "
        "use the model that the file was made for"
    )


def svd_error(source: object) -> DitError:
    """A DitError for a truncated SVD of what is no whole weight."""
    return DitError(
        f"'{source}' holds no whole weights: a rank for the SVD can be given for finetuned models only"
    )


def check_values(array: np.ndarray, name: str, source: object) -> np.ndarray:
    """The array itself. Raises DitError if it holds no floats, or NaN or infinity."""
    if array.dtype.name not in FLOATS:
        raise DitError(
            f"'{source}': {short(name)} holds {array.dtype.name} values instead of floats"
        )
    with np.errstate(over="ignore"):
        # What is beyond fp32 would become infinity later.
        narrow = array.astype(np.float32) if array.dtype == np.float64 else array
    if not np.isfinite(narrow).all():
        raise DitError(
            f"'{source}': {short(name)} holds NaN or infinity: the diff is broken, get another"
        )
    return array
