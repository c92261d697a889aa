"""Model families: their `config.json`, read and written, and their released sizes by name.

A family is an entry of `FAMILIES`, and where it has modules of its own, entries of `modules.all_modules`.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from dit_jax.errors import DitError
from dit_jax.formats.files import read_json_object
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.gguf_checkpoint import gguf_config
from dit_jax.models.rope import read_rope

MAX_LAYERS = 1_000

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


class Family(NamedTuple):
    """What a family does not share with the others.

    Attributes:
        title: its name in messages.
        architecture: the class of transformers.
        absent: what transformers takes for entries of config.json that are not there. What is not named here either
            must be there.
        read: (content of config.json, where it stands) -> its own fields of `DecoderConfig`. Raises DitError for
            what is not computed exactly.
        write: config -> its own entries of config.json.
    """

    title: str
    architecture: str
    absent: dict[str, Any]
    read: Callable[[dict[str, Any], str], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]


def _check_activation(raw: dict[str, Any], where: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise DitError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")


def _refuse_windows(raw: dict[str, Any], where: str) -> None:
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise DitError(f"{where}: 'layer_types' must be a list, not {layer_types!r}")
    if raw.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise DitError(f"{where}: sliding-window attention is not supported")


def _read_qwen3(raw: dict[str, Any], where: str) -> dict[str, Any]:
    if raw.get("attention_bias"):
        raise DitError(f"{where}: attention_bias=true is not supported")
    _check_activation(raw, where)
    _refuse_windows(raw, where)
    return {}


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _read_qwen2(raw: dict[str, Any], where: str) -> dict[str, Any]:
    _check_activation(raw, where)
    _refuse_windows(raw, where)
    return {"qk_norm": False, "biases": _QKV}


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_dropout": 0.0, "hidden_act": "silu", "use_sliding_window": False}


def _read_llama(raw: dict[str, Any], where: str) -> dict[str, Any]:
    _check_activation(raw, where)
    attention = (*_QKV, "o_proj") if raw.get("attention_bias") else ()
    mlp = ("gate_proj", "up_proj", "down_proj") if raw.get("mlp_bias") else ()
    return {"qk_norm": False, "biases": (*attention, *mlp)}


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": "o_proj" in config.biases,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": "up_proj" in config.biases,
    }


_QKV = ("q_proj", "k_proj", "v_proj")
_FROM_SIZES = {"head_dim": None, "num_key_value_heads": None}  # D / N, and N

FAMILIES = {
    "qwen3": Family(
        "dense Qwen3", "Qwen3ForCausalLM", {"head_dim": 128}, _read_qwen3, _write_qwen3
    ),
    "qwen2": Family(
        "Qwen2 and Qwen2.5", "Qwen2ForCausalLM", {"head_dim": None}, _read_qwen2, _write_qwen2
    ),
    "llama": Family(
        "Llama 2 and 3 and SmolLM2",
        "LlamaForCausalLM",
        {**_FROM_SIZES, "rope_theta": 1e4},
        _read_llama,
        _write_llama,
    ),
}


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def _llama(
    vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int, **more: Any
) -> DecoderConfig:
    sizes = (vocab, hidden, ffn, layers, heads, kv, hidden // heads)
    fixed = {"rms_norm_eps": 1e-5, "model_type": "llama", "qk_norm": False}
    return DecoderConfig(*sizes, **{**fixed, **more})


def _llama3(
    hidden: int, ffn: int, layers: int, heads: int, factor: float, tied: bool
) -> DecoderConfig:
    scaling = {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    rope = {"rope_theta": 5e5, "rope_scaling": tuple(scaling.items())}
    return _llama(128256, hidden, ffn, layers, heads, 8, tie_word_embeddings=tied, **rope)


def _smollm2(
    hidden: int, ffn: int, layers: int, heads: int, kv: int, theta: float
) -> DecoderConfig:
    more = {"rope_theta": theta, "tie_word_embeddings": True}
    return _llama(49152, hidden, ffn, layers, heads, kv, **more)


# Released sizes by name.
NAMED_CONFIGS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, 32.0, True),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, 32.0, True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, 8.0, False),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, 8.0, False),
    "smollm2-135m": _smollm2(576, 1536, 30, 9, 3, 1e5),
    "smollm2-360m": _smollm2(960, 2560, 32, 15, 5, 1e5),
    "smollm2-1.7b": _smollm2(2048, 8192, 24, 32, 32, 1.3e5),
}


def read_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Reads `config.json` of a Hugging Face folder, or what a GGUF file says in its place.

    Raises:
        DitError: the file is missing or not JSON, or it describes something that this program does not compute
            exactly (another family, rope scaling, sliding windows, biases, quantised weights).
    """
    folder = pathlib.Path(folder)
    if folder.suffix.lower() == ".gguf":
        return parse_config(gguf_config(folder), str(folder))
    path = folder / "config.json"
    if not path.exists():
        raise DitError(f"{path} does not exist: a model is a folder in Hugging Face format")
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], where: str) -> DecoderConfig:
    """The `DecoderConfig` of a `config.json`'s content. Raises DitError that names what is not supported."""
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(f"{family.title} ({name!r})" for name, family in FAMILIES.items())
        raise DitError(f"{where}: model_type {kind!r} is not supported, only {known}")
    raw = {**family.absent, **raw}
    for key in ("quantization_config", "num_experts", "layer_scales"):
        if raw.get(key):
            raise DitError(
                f"{where}: {key!r} is not supported: use a dense model with plain weights"
            )
    fields: dict[str, Any] = family.read(raw, where)
    for key in _SIZES:
        value = raw.get(key)
        if value is None and key in family.absent:
            value = raw.get("num_attention_heads")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise DitError(f"{where}: {key!r} must be a positive integer, not {value!r}")
        fields[key] = value
    head_dim = raw["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    if fields["num_hidden_layers"] > MAX_LAYERS:
        raise DitError(f"{where}: more than {MAX_LAYERS} layers are not supported")
    if not isinstance(head_dim, int) or not 2 <= head_dim < 2**16 or head_dim % 2:
        raise DitError(f"{where}: 'head_dim' must be a positive even integer, not {head_dim!r}")
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        raise DitError(f"{where}: num_attention_heads must be a multiple of num_key_value_heads")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise DitError(f"{where}: 'tie_word_embeddings' must be true or false, not {tied!r}")
    eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, int | float) or not 0 < eps < 1:
        raise DitError(f"{where}: 'rms_norm_eps' must be a small positive number, not {eps!r}")
    theta, scaling = read_rope(raw, where)
    common = {
        "head_dim": head_dim,
        "rms_norm_eps": float(eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": tied,
    }
    return DecoderConfig(**{**fields, **common, "model_type": kind})


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of this architecture, as transformers >= 5 writes it."""
    family = FAMILIES[config.model_type]
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in _SIZES},
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            "rope_type": "default",
            **dict(config.rope_scaling),
        },
        "tie_word_embeddings": config.tie_word_embeddings,
        **family.write(config),
        "dtype": config.dtype,
    }
