"""Model families: their `config.json`, read and written, and their released sizes by name.

A family is an entry of `FAMILIES`, and where it has modules of its own, entries of `modules.all_modules`.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from dit_jax.errors import DitError
from dit_jax.formats.files import read_json_object
from dit_jax.models.decoder_config import DecoderConfig

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
        read: (content of config.json, where it stands) -> its own fields of `DecoderConfig`. Raises DitError for
            what is not computed exactly.
        write: config -> its own entries of config.json.
    """

    title: str
    architecture: str
    read: Callable[[dict[str, Any], str], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]


def _read_qwen3(raw: dict[str, Any], where: str) -> dict[str, Any]:
    if raw.get("attention_bias"):
        raise DitError(f"{where}: attention_bias=true is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise DitError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise DitError(f"{where}: 'layer_types' must be a list, not {layer_types!r}")
    if raw.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise DitError(f"{where}: sliding-window attention is not supported")
    return {"head_dim": raw.get("head_dim", 128)}  # absent, it is the default of transformers


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


FAMILIES = {"qwen3": Family("dense Qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3)}


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


# Released sizes by name.
NAMED_CONFIGS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
}


def read_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Reads `config.json` of a Hugging Face folder.

    Raises:
        DitError: the file is missing or no JSON, or it describes something this program does not
            compute exactly (another family, rope scaling, sliding windows, biases, quantised weights).
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.exists():
        raise DitError(f"{path} does not exist: a model is a folder in Hugging Face format")
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], where: str) -> DecoderConfig:
    """Turns the content of a `config.json` into a `DecoderConfig`; refuses by name what is not supported."""
    kind = raw.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(f"{family.title} ({name!r})" for name, family in FAMILIES.items())
        raise DitError(f"{where}: model_type {kind!r} is not supported, only {known}")
    for key in ("quantization_config", "num_experts", "layer_scales"):
        if raw.get(key):
            raise DitError(
                f"{where}: {key!r} is not supported: use a dense model with plain weights"
            )
    fields: dict[str, Any] = family.read(raw, where)
    for key in _SIZES:
        value = raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise DitError(f"{where}: {key!r} must be a positive integer, not {value!r}")
        fields[key] = value
    head_dim = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
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
    common = {
        "head_dim": head_dim,
        "rms_norm_eps": float(eps),
        "rope_theta": _rope_theta(raw, where),
        "tie_word_embeddings": tied,
    }
    return DecoderConfig(**{**fields, **common, "model_type": kind})


def _rope_theta(raw: dict[str, Any], where: str) -> float:
    """`rope_theta` as written before (top level) and since (`rope_parameters`) transformers 5."""
    parameters = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise DitError(f"{where}: 'rope_parameters' and 'rope_scaling' must be objects")
    for source in (parameters, scaling):
        kind = source.get("rope_type", source.get("type", "default"))
        if kind != "default":
            raise DitError(f"{where}: rope scaling of type {kind!r} is not supported")
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < 1e30:
        raise DitError(f"{where}: no usable 'rope_theta' at top level or in 'rope_parameters'")
    return float(theta)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of this architecture, as transformers >= 5 writes it."""
    family = FAMILIES[config.model_type]
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in _SIZES},
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_word_embeddings,
        **family.write(config),
        "dtype": config.dtype,
    }
