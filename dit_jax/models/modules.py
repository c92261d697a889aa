"""The modules of a decoder in one table: path in the trees, Hugging Face name, kind, shape and logical axes.

Whatever walks a model's weights reads this table: files in and out, deltas and their checks, shardings, parameter
counts. A family that has other modules has other entries here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig

Path = tuple[str, ...]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = ("embed_tokens",), ("lm_head",)

# What the one weight of a module is called in the parameter tree, by the module's kind.
_LEAVES = {
    "embedding": "embedding",
    "norm": "scale",
    "projection": "kernel",
    "bias": "bias",
    "head": "kernel",
}


@dataclasses.dataclass(frozen=True)
class Module:
    """A module, which holds one weight.

    Attributes:
        path: its place in the trees of parameters and deltas; "layers" comes first inside the layers.
        name: its Hugging Face name; {} stands for the layer.
        kind: "embedding", "norm", "projection", "bias" (of a projection, a module of its own) or "head".
        shape: of its weight in the parameter tree, without the axis of layers.
        axes: logical axes of that shape (docs/sharding.md).
        layers: number of layers that have it; 0 outside the layers.
        units: how many pieces a projection may be split into: heads are never cut.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    layers: int = 0
    units: int = 0

    @property
    def lora(self) -> bool:
        """Whether a delta may hold LoRA factors of it."""
        return self.kind == "projection"

    @property
    def tensor(self) -> str:
        """The name of its tensor in Hugging Face files; {} stands for the layer."""
        return self.name if self.kind == "bias" else f"{self.name}.weight"

    @property
    def leaf(self) -> str:
        """The name of its weight in the parameter tree."""
        return _LEAVES[self.kind]

    @property
    def stacked(self) -> tuple[int, ...]:
        """The shape of the leaf in the parameter tree: all layers."""
        return (self.layers, *self.shape) if self.layers else self.shape

    @property
    def stacked_axes(self) -> tuple[str | None, ...]:
        """The logical axes of that leaf."""
        return ("layers", *self.axes) if self.layers else self.axes

    @property
    def indices(self) -> Sequence[int | None]:
        """The layers that have it; (None,) outside the layers."""
        return range(self.layers) if self.layers else (None,)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of its tensor in Hugging Face files."""
        return self.shape if self.kind == "embedding" else self.shape[::-1]

    def turn(self, array: Any) -> Any:
        """One layer's weight, from the orientation of Hugging Face files to ours or back (a view)."""
        return array if self.kind == "embedding" else array.T


def bias_of(projection: str) -> str:
    """The name of a projection's bias in the trees: a module beside it, so that a delta may change either."""
    return f"{projection}_bias"


@functools.lru_cache
def all_modules(config: DecoderConfig) -> dict[Path, Module]:
    """The modules of a model by path, in the order of its files; a head that is tied to the embedding included."""
    d, f, v, h = config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    n, k = config.num_attention_heads, config.num_key_value_heads
    layers = config.num_hidden_layers

    def inner(name: str, kind: str, shape: tuple[int, ...], axes: Any, units: int = 0) -> Module:
        path = ("layers", *name.split("."))
        return Module(path, f"model.layers.{{}}.{name}", kind, shape, axes, layers, units)

    def norm(name: str, size: int) -> list[Module]:
        return [inner(name, "norm", (size,), (None,))]

    def linear(name: str, shape: tuple[int, int], axes: Any, units: int) -> list[Module]:
        made = inner(name, "projection", shape, axes, units)
        *group, last = made.path
        if last not in config.biases:
            return [made]
        path = (*group, bias_of(last))
        bias = (f"{made.name}.bias", "bias", shape[1:], axes[1:], layers, units)
        return [made, Module(path, *bias)]

    qk_norms = [*norm("self_attn.q_norm", h), *norm("self_attn.k_norm", h)]
    table = (
        Module(EMBEDDING, "model.embed_tokens", "embedding", (v, d), ("vocab", "embed")),
        Module(("norm",), "model.norm", "norm", (d,), (None,)),
        Module(HEAD, "lm_head", "head", (d, v), ("embed", "vocab")),
        *norm("input_layernorm", d),
        *linear("self_attn.q_proj", (d, n * h), ("embed", "heads"), n),
        *linear("self_attn.k_proj", (d, k * h), ("embed", "kv_heads"), k),
        *linear("self_attn.v_proj", (d, k * h), ("embed", "kv_heads"), k),
        *linear("self_attn.o_proj", (n * h, d), ("heads", "embed"), n),
        *(qk_norms if config.qk_norm else ()),
        *norm("post_attention_layernorm", d),
        *(norm("pre_feedforward_layernorm", d) if config.sandwich_norm else ()),
        *(norm("post_feedforward_layernorm", d) if config.sandwich_norm else ()),
        *linear("mlp.gate_proj", (d, f), ("embed", "mlp"), f),
        *linear("mlp.up_proj", (d, f), ("embed", "mlp"), f),
        *linear("mlp.down_proj", (f, d), ("mlp", "embed"), f),
    )
    return {module.path: module for module in table}


@functools.lru_cache
def module_table(config: DecoderConfig) -> dict[Path, Module]:
    """The modules of a model that have a weight of their own, by path, in the order of its files."""
    tied = config.tie_word_embeddings
    return {path: m for path, m in all_modules(config).items() if not (tied and path == HEAD)}


def projections(config: DecoderConfig) -> dict[str, Module]:
    """The modules that may hold LoRA factors, by the names of `PROJECTIONS`."""
    return {path[-1]: module for path, module in module_table(config).items() if module.lora}


def stream_writers(config: DecoderConfig) -> list[Path]:
    """The paths of the projections that write into the residual stream."""
    return [module.path for module in projections(config).values() if module.axes[-1] == "embed"]


def stream_readers(config: DecoderConfig) -> dict[Path, Path]:
    """By the paths of the projections that read the residual stream: that of the norm before each."""
    before_mlp = "pre_feedforward_layernorm" if config.sandwich_norm else "post_attention_layernorm"
    norms = {"self_attn": "input_layernorm", "mlp": before_mlp}
    readers = [m.path for m in projections(config).values() if m.axes[0] == "embed"]
    return {path: ("layers", norms[path[1]]) for path in readers}


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


def count_parameters(config: DecoderConfig, lora_only: bool = False) -> int:
    """Number of parameters, counting a tied head once; with `lora_only`, those of the projections."""
    table = module_table(config).values()
    return sum(math.prod(m.stacked) for m in table if m.lora or not lora_only)


# ------------------------------------------------------------------ trees


def make_tree(config: DecoderConfig, make: Callable[[Module], Any]) -> dict[str, Any]:
    """A tree like the parameters, with make(module) in place of each weight."""
    tree: dict[str, Any] = {}
    for path, module in module_table(config).items():
        set_at(tree, path, {module.leaf: make(module)})
    return tree


def abstract_weights(config: DecoderConfig) -> dict[str, Any]:
    """The parameters as ShapeDtypeStructs in `config.dtype`."""
    import jax  # here: declarations of config keys read this table without one

    dtype = jax.numpy.dtype(config.dtype)
    return make_tree(config, lambda module: jax.ShapeDtypeStruct(module.stacked, dtype))


def get_at(tree: Any, path: Path) -> Any:
    """The node of nested dicts at a path."""
    for key in path:
        tree = tree[key]
    return tree


def set_at(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Puts a node into nested dicts, in place."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def weight(params: Any, module: Module, layer: int | None) -> Any:
    """A module's weight, of one layer."""
    leaf = get_at(params, module.path)[module.leaf]
    return leaf if layer is None else leaf[layer]


# ------------------------------------------------------------------ names in files


def tensor_names(config: DecoderConfig) -> dict[str, tuple[Module, int | None]]:
    """Hugging Face tensor name -> (module, layer index or None), in the order of the files."""
    table = module_table(config).values()
    return {
        module.tensor.format(layer): (module, layer)
        for layer in (None, *range(config.num_hidden_layers))
        for module in table
        if layer in module.indices
    }
