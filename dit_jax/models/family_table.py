"""The table of model families: what each does not share with the others, in its `config.json` and in the model.

A family with modules of its own has entries of `modules.all_modules`, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from dit_jax.errors import DitError
from dit_jax.models.decoder_config import WINDOWED, DecoderConfig
from dit_jax.models.rope_config import read_rope, write_rope


class Family(NamedTuple):
    """What a family does not share with the others.

    Attributes:
        title: its name in messages.
        architecture: the class of transformers.
        absent: what transformers takes for entries of config.json that are not there. What is not named here either
            must be there.
        read: (content of config.json with checked sizes, where it stands) -> its own fields of `DecoderConfig`. Raises
            DitError for what is not computed exactly.
        write: config -> its own entries of config.json.
        flat: (content, where) -> content with the entries where the other families have theirs.
    """

    title: str
    architecture: str
    absent: dict[str, Any]
    read: Callable[[dict[str, Any], str], dict[str, Any]]
    write: Callable[[DecoderConfig], dict[str, Any]]
    flat: Callable[[dict[str, Any], str], dict[str, Any]] = lambda raw, where: raw


CONTEXT = "max_position_embeddings"
_QKV = ("q_proj", "k_proj", "v_proj")
_WINDOW, _FULL = WINDOWED, "full_attention"


def positive_integer(value: Any, key: str, where: str) -> int:
    """The value of an entry of config.json. Raises DitError: it is no positive integer of 32 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise DitError(f"{where}: {key!r} must be a positive integer, not {value!r}")
    return value


def _check_activation(raw: dict[str, Any], where: str, key: str = "hidden_act") -> None:
    wanted = "silu" if key == "hidden_act" else "gelu_pytorch_tanh"
    if raw.get(key, wanted) != wanted:
        raise DitError(f"{where}: {key} {raw[key]!r} is not supported, only {wanted!r}")


def _read_windows(raw: dict[str, Any], types: Any, where: str) -> dict[str, Any]:
    """The fields `sliding_window` and `layer_types`; all layers alike have no types."""
    count = raw["num_hidden_layers"]
    if (
        not isinstance(types, list)
        or [t for t in types if t not in (_WINDOW, _FULL)]
        or len(types) != count
    ):
        raise DitError(
            f"{where}: 'layer_types' must hold {_FULL!r} or {_WINDOW!r} for each of {count} layers, not {types!r}"
        )
    if _WINDOW not in types:
        return {}
    size = positive_integer(raw.get("sliding_window"), "sliding_window", where)
    return {"sliding_window": size, "layer_types": tuple(types) if _FULL in types else ()}


def _layer_types(config: DecoderConfig) -> list[str]:
    alike = _WINDOW if config.sliding_window else _FULL
    return [*(config.layer_types or (alike,) * config.num_hidden_layers)]


def _qwen_windows(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Windows of Qwens: off unless `use_sliding_window`, then in the layers from `max_window_layers` on."""
    types, count = raw.get("layer_types"), raw["num_hidden_layers"]
    if not raw.get("use_sliding_window"):
        if isinstance(types, list) and _WINDOW in types:
            raise DitError(f"{where}: 'layer_types' has sliding windows without use_sliding_window")
        return _read_windows(raw, types, where) if types else {}
    if not types:
        first = raw.get("max_window_layers")
        if not isinstance(first, int) or first < 0:
            raise DitError(
                f"{where}: use_sliding_window=true needs 'sliding_window' and 'max_window_layers'"
            )
        types = [_FULL] * min(first, count) + [_WINDOW] * max(0, count - first)
    return _read_windows(raw, types, where)


def _write_qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    if not config.sliding_window:
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": _layer_types(config),
    }


def _read_qwen3(raw: dict[str, Any], where: str) -> dict[str, Any]:
    if raw.get("attention_bias"):
        raise DitError(f"{where}: attention_bias=true is not supported")
    _check_activation(raw, where)
    return _qwen_windows(raw, where)


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        **_write_qwen_windows(config),
    }


def _read_qwen2(raw: dict[str, Any], where: str) -> dict[str, Any]:
    _check_activation(raw, where)
    return {"qk_norm": False, "biases": _QKV, **_qwen_windows(raw, where)}


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_dropout": 0.0, "hidden_act": "silu", **_write_qwen_windows(config)}


def _read_llama(raw: dict[str, Any], where: str) -> dict[str, Any]:
    _check_activation(raw, where)
    # transformers makes its cache by them.
    if raw.get("layer_types") not in (None, [], [_FULL] * raw["num_hidden_layers"]):
        raise DitError(f"{where}: a Llama whose 'layer_types' has windows is not supported")
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


def _read_mistral(raw: dict[str, Any], where: str) -> dict[str, Any]:
    _check_activation(raw, where)
    alike = _FULL if raw["sliding_window"] is None else _WINDOW
    types = [alike] * raw["num_hidden_layers"]
    if raw.get("layer_types") not in (None, [], types):
        raise DitError(f"{where}: a Mistral whose 'layer_types' differ is not supported")
    return {"qk_norm": False, **_read_windows(raw, types, where)}


def _write_mistral(config: DecoderConfig) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "sliding_window": config.sliding_window or None,
    }


def _flat_gemma3(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The text part of a multimodal config, and the two ropes where they stood before transformers 5."""
    if raw["model_type"] == "gemma3":
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise DitError(f"{where}: 'text_config' must be an object, not {text!r}")
        raw = {
            **{k: v for k, v in raw.items() if k not in ("text_config", "vision_config")},
            **text,
        }
    ropes = raw.get("rope_parameters")
    if ropes is None:
        return raw
    parts = [ropes.get(kind) or {} for kind in (_FULL, _WINDOW)] if isinstance(ropes, dict) else []
    if not parts or not {*ropes} <= {_FULL, _WINDOW} or not all(isinstance(p, dict) for p in parts):
        raise DitError(
            f"{where}: 'rope_parameters' must have the entries {_FULL!r} and {_WINDOW!r}"
        )
    full, local = parts
    return {**raw, "rope_parameters": full, "rope_local_parameters": local}


def _read_gemma3(raw: dict[str, Any], where: str) -> dict[str, Any]:
    _check_activation(raw, where, "hidden_activation")
    types, every = raw.get("layer_types"), raw.get("sliding_window_pattern")
    if not types and isinstance(every, int) and every > 0:
        count = raw["num_hidden_layers"]
        types = [_WINDOW if (i + 1) % every else _FULL for i in range(count)]
    windows = _read_windows(raw, types, where)
    local = {
        "rope_theta": raw["rope_local_base_freq"],
        "rope_parameters": raw.get("rope_local_parameters"),
    }
    theta, scaling = read_rope(local, f"{where}, sliding_attention")
    if scaling:
        raise DitError(f"{where}: rope scaling of layers with sliding windows is not supported")
    scalar = raw.get("query_pre_attn_scalar")
    if not isinstance(scalar, int | float) or not 0 < scalar < 1e9:
        raise DitError(
            f"{where}: 'query_pre_attn_scalar' must be a positive number, not {scalar!r}"
        )
    return {
        **windows,
        "rope_local_base_freq": theta if windows else 0.0,
        "biases": (*_QKV, "o_proj") if raw.get("attention_bias") else (),
        "sandwich_norm": True,
        "unit_offset_norm": True,
        "scale_embeddings": True,
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": float(scalar),
    }


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    theta = config.rope_local_base_freq or 1e4
    scalar = config.query_pre_attn_scalar
    return {
        "attention_bias": bool(config.biases),
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": _layer_types(config),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "rope_parameters": {
            _FULL: write_rope(config),
            _WINDOW: {"rope_theta": theta, "rope_type": "default"},
        },
        "sliding_window": config.sliding_window or 4096,
        "use_bidirectional_attention": False,
    }


_FROM_SIZES = {"head_dim": None, "num_key_value_heads": None}  # D / N, and N

_GEMMA3 = Family(
    "Gemma 3 (text)",
    "Gemma3ForCausalLM",
    {
        "vocab_size": 262_208,
        CONTEXT: 131_072,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 1e4,
        "rope_theta": 1e6,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
    _read_gemma3,
    _write_gemma3,
    _flat_gemma3,
)

FAMILIES = {
    "qwen3": Family(
        "dense Qwen3",
        "Qwen3ForCausalLM",
        {"head_dim": 128, CONTEXT: 32_768},
        _read_qwen3,
        _write_qwen3,
    ),
    "qwen2": Family(
        "Qwen2 and Qwen2.5",
        "Qwen2ForCausalLM",
        {"head_dim": None, CONTEXT: 32_768},
        _read_qwen2,
        _write_qwen2,
    ),
    "llama": Family(
        "Llama 2 and 3 and SmolLM2",
        "LlamaForCausalLM",
        {**_FROM_SIZES, "rope_theta": 1e4, CONTEXT: 2048},
        _read_llama,
        _write_llama,
    ),
    "mistral": Family(
        "Mistral",
        "MistralForCausalLM",
        {
            **_FROM_SIZES,
            "num_key_value_heads": 8,
            "rope_theta": 1e4,
            "sliding_window": 4096,
            CONTEXT: 131_072,
        },
        _read_mistral,
        _write_mistral,
    ),
    "gemma3_text": _GEMMA3,
}
MULTIMODAL = {"gemma3": "gemma3_text"}  # read as its text part
