"""The modules of a decoder: their names here and in Hugging Face checkpoints, and the shapes of their weights."""

import re
from collections.abc import Sequence

from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projection_shapes(config: DecoderConfig) -> dict[str, tuple[str, int, int]]:
    """projection -> (parent module, in, out)."""
    d, f = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {
        "q_proj": ("self_attn", d, q),
        "k_proj": ("self_attn", d, kv),
        "v_proj": ("self_attn", d, kv),
        "o_proj": ("self_attn", q, d),
        "gate_proj": ("mlp", d, f),
        "up_proj": ("mlp", d, f),
        "down_proj": ("mlp", f, d),
    }


def check_projections(names: Sequence[str], key: str = "projections") -> None:
    """Raises DitError unless these are projections, at least one, and each once.

    Args:
        key: what the config calls them.
    """
    unknown = [name for name in names if name not in PROJECTIONS]
    if unknown:
        raise DitError(
            f"{key}: unknown projection {unknown[0]!r}: choose from {', '.join(PROJECTIONS)}"
        )
    if not names or len(set(names)) < len(names):
        raise DitError(f"{key}: name at least one projection, and each once, not {tuple(names)}")


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


def locate(name: str, config: DecoderConfig, source: object) -> tuple[Path, int | None]:
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


def weight_shape(path: Path, config: DecoderConfig) -> tuple[int, ...]:
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


def weight_paths(config: DecoderConfig) -> set[Path]:
    """The modules of a model that have a weight."""
    inside: list[Path] = [*_NORMS.values()]
    inside += [(parent, name) for name, (parent, _, _) in projection_shapes(config).items()]
    head = [] if config.tie_word_embeddings else [("lm_head",)]
    return {("embed_tokens",), ("norm",), *head, *(("layers", *path) for path in inside)}


def is_projection(path: Path) -> bool:
    """Whether the module is one of the seven linear layers of a block."""
    return path[-1].endswith("_proj")
