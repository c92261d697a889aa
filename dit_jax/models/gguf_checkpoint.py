"""Models in GGUF files: their config.json and weights as a folder in Hugging Face format would have them.

llama.cpp writes other names, adds 1 to Gemma's norms, and reorders the rows of q and k of a Llama; all is undone here.
Source: `convert_hf_to_gguf.py` of llama.cpp.
"""

import pathlib
import re
from typing import Any

import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.formats.gguf_file import GgufFile, open_gguf

# With the model types whose files llama.cpp's scripts call so, of a model in a file the first.
ARCHITECTURES = {
    "llama": ("llama", "mistral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "gemma3": ("gemma3_text",),
}

# Modules outside the layers, and of a layer `blk.N`.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3 = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NUMBER = re.compile("0|[1-9][0-9]{0,5}")  # of a layer: only one way to write it
_ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's rule for these factors is not in the file: the released models have one of these.
_LLAMA3_FACTORS = (8.0, 32.0)
_LLAMA3_RULE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def find_gguf(path: pathlib.Path) -> pathlib.Path | None:
    """The GGUF file that a path leads to: the file itself, or the one of a folder without config.json; else None.

    Raises:
        DitError: a folder with several.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise DitError(f"'{path}' holds {len(files)} GGUF files ({names}): name one of them")
    return files[0] if files else None


def gguf_config(path: pathlib.Path) -> dict[str, Any]:
    """What config.json of the model would say.

    Raises:
        DitError: another architecture than those of `ARCHITECTURES`, a file that lacks a number or says something of
            attention or angles that is not computed.
    """
    file = open_gguf(path)
    architecture, shapes = _architecture(file), file.shapes()
    _check_known(file, architecture)

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise DitError(f"'{path}' lacks '{architecture}.{key}': get another GGUF file")
        if type(value) not in (int, kind) or not 0 < value < 2**31:
            wanted = "a positive integer" if kind is int else "a positive number"
            raise DitError(
                f"'{path}': '{architecture}.{key}' is {short(value)} instead of {wanted}: get the file again"
            )
        return value

    heads, layers = get("attention.head_count", int), get("block_count", int)
    if layers > len(shapes):
        raise DitError(f"'{path}' has {layers} layers and {len(shapes)} tensors: get it again")
    head_dim = get("attention.key_length", int, get("embedding_length", int) // heads or 1)
    theta = get("rope.freq_base", float, 10000.0)
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture][0],
        "vocab_size": shapes.get("token_embd.weight", (None,))[0],
        "hidden_size": get("embedding_length", int),
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in shapes,
        "max_position_embeddings": get("context_length", int),
        "rope_parameters": {"rope_theta": theta, **_scaling(file, theta, head_dim)},
    }
    if get("rope.dimension_count", int, head_dim) != head_dim:
        raise DitError(f"'{path}' rotates a part of each head only, which is not supported")
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if architecture == "gemma3":
        config |= _gemma3(get, config)
    return config


# What of attention and angles is read, or says what is computed in any case.
_KNOWN = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
_KNOWN_OF_GEMMA = {"attention.sliding_window", "rope.freq_base_swa"}
_FACTORS = ("softcapping", "_scale")
_AS_COMPUTED = {
    "attention.causal": True,
    "attention.sliding_window_pattern": 6,
    "rope.scaling.attn_factor": 1,
}


def _check_known(file: GgufFile, architecture: str) -> None:
    """Raises DitError for an entry that changes what the model computes, and is not read."""
    known = _KNOWN | (_KNOWN_OF_GEMMA if architecture == "gemma3" else set())
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{architecture}.")
        matters = name.startswith(("attention.", "rope.")) or name.endswith(_FACTORS)
        if name == key or not matters or name in known or value == _AS_COMPUTED.get(name, 0):
            continue
        raise DitError(
            f"'{file.path}': {short(key)} = {short(value)} is not supported: use another model, or its folder in "
            "Hugging Face format"
        )


def _architecture(file: GgufFile) -> str:
    architecture = file.architecture
    if file.metadata.get("general.type") == "adapter":
        raise DitError(
            f"'{file.path}' is a LoRA and no base model: give the model that it was trained on as the base (--base), "
            "and this file as --diff or --adapter"
        )
    if architecture not in [*ARCHITECTURES]:  # which may be of any type
        raise DitError(
            f"'{file.path}' holds the architecture {short(architecture)}: GGUF files of {', '.join(ARCHITECTURES)} "
            "are read"
        )
    return architecture


def _scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Rope scaling, in the words of config.json."""
    start = f"{file.architecture}.rope.scaling."
    factor = file.metadata.get(f"{start}factor")
    kind = file.metadata.get(f"{start}type", "none" if factor is None else "linear")  # as llama.cpp
    if _ROPE_FACTORS in file.shapes():
        made = _llama3_factor(file, theta, head_dim)
        return {"rope_type": "llama3", **_LLAMA3_RULE, "factor": made}
    if kind == "none":
        return {"rope_type": "default"}
    before = file.metadata.get(f"{start}original_context_length")
    known = {} if before is None else {"original_max_position_embeddings": before}
    return {"rope_type": kind, "factor": factor, **known}


def _llama3_factor(file: GgufFile, theta: float, head_dim: int) -> float:
    """The factor of Llama 3's rope scaling by which the wavelengths in the file were made. Raises DitError: none."""
    from dit_jax.models.rope import llama3_frequency  # which needs jax, while a config does not

    found = file.read(_ROPE_FACTORS)
    plain = theta ** (-np.arange(head_dim // 2) / (head_dim // 2))
    for factor in _LLAMA3_FACTORS:
        scaled = llama3_frequency(plain, {**_LLAMA3_RULE, "factor": factor})
        if found.shape == plain.shape and np.allclose(found, plain / scaled, rtol=1e-3):
            return factor
    raise DitError(
        f"'{file.path}' scales its rotary frequencies by a rule that it does not name: use the model's folder in "
        "Hugging Face format"
    )


def _gemma3(get: Any, config: dict[str, Any]) -> dict[str, Any]:
    # As llama.cpp has it: the 27B model scales by its width, all others by their heads.
    width = config["hidden_size"] // config["num_attention_heads"]
    scalar = width if config["num_hidden_layers"] == 62 else config["head_dim"]
    layers = range(1, config["num_hidden_layers"] + 1)
    local = {"rope_theta": get("rope.freq_base_swa", float, 10000.0), "rope_type": "default"}
    return {
        "query_pre_attn_scalar": scalar,
        "sliding_window": get("attention.sliding_window", int),
        "layer_types": ["full_attention" if i % 6 == 0 else "sliding_attention" for i in layers],
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": local,
        },
        "hidden_activation": "gelu_pytorch_tanh",
    }


class GgufWeights:
    """The weights of a model under their Hugging Face names: `shapes()`, `dtypes()` and `read(name)`, as in `Tensors`.

    Raises:
        DitError: at construction, for a tensor that is none of these models.
    """

    def __init__(self, path: pathlib.Path):
        self._file = open_gguf(path)
        self._architecture = _architecture(self._file)
        said = self._file.metadata
        heads = said.get(f"{self._architecture}.attention.head_count", 1)
        kv_heads = said.get(f"{self._architecture}.attention.head_count_kv", heads)
        self._heads = (heads, kv_heads)
        self._names = {}
        for name in self._file.shapes():
            if name != _ROPE_FACTORS:
                self._names[hf_name(name, self._architecture, self._file.path)] = name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by Hugging Face name."""
        shapes = self._file.shapes()
        return {ours: shapes[name] for ours, name in self._names.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """Types by Hugging Face name, after dequantisation."""
        return dict.fromkeys(self._names, np.dtype(np.float32))

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, as the Hugging Face file has it."""
        values = self._file.read(self._names[name])
        if self._architecture == "gemma3" and name.endswith("norm.weight"):
            return values - 1
        return undo_row_order(values, name, self._architecture, self._heads)


def undo_row_order(
    values: np.ndarray, name: str, architecture: str, heads: tuple[int, int]
) -> np.ndarray:
    """The rows of q and k of a Llama in the order that Hugging Face has; all else as it is.

    Args:
        values: [out, …], a weight, a bias or LoRA's B of the module.
        name: the Hugging Face name.
        heads: number of heads of queries and of keys.
    """
    for projection, count in zip((".q_proj.", ".k_proj."), heads, strict=True):
        if architecture == "llama" and projection in name:
            halves = values.reshape(count, values.shape[0] // count // 2, 2, *values.shape[1:])
            return halves.swapaxes(1, 2).reshape(values.shape)
    return values


def hf_name(name: str, architecture: str, source: pathlib.Path) -> str:
    """The Hugging Face name of a tensor. Raises DitError: it is none of this architecture."""
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    match module.split("."):
        case ["blk", number, part] if _NUMBER.fullmatch(number):
            inside = (_GEMMA3 if architecture == "gemma3" else _LAYER).get(part)
            if inside is not None:
                return f"model.layers.{number}.{inside}.{kind}"
    raise DitError(
        f"'{source}' holds the tensor {short(name)}, which no dense {architecture} has: use another model"
    )
