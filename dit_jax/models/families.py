"""Model families: their `config.json`, read and written, and their released sizes by name.

A family is an entry of `FAMILIES`, and where it has modules of its own, entries of `modules.all_modules`.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from dit_jax.errors import DitError
from dit_jax.formats.files import read_json_object, short
from dit_jax.formats.recognise import QUANTISED, adapter_file, what_checkpoint
from dit_jax.models.decoder_config import WINDOWED, DecoderConfig
from dit_jax.models.gguf_checkpoint import gguf_config
from dit_jax.models.rope_config import read_rope
from dit_jax.models.unsupported_families import EXPERTS, what_it_is
from dit_jax.runtime.os_errors import explain_os_errors

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


_QKV = ("q_proj", "k_proj", "v_proj")
_WINDOW, _FULL = WINDOWED, "full_attention"


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
    size = raw.get("sliding_window")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DitError(f"{where}: 'sliding_window' must be a positive integer, not {size!r}")
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
            _FULL: _rope_parameters(config),
            _WINDOW: {"rope_theta": theta, "rope_type": "default"},
        },
        "sliding_window": config.sliding_window or 4096,
        "use_bidirectional_attention": False,
    }


_CONTEXT = "max_position_embeddings"
_MUST_BE_OFF = (
    "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "per_layer_config",
)  # fmt: skip
_FROM_SIZES = {"head_dim": None, "num_key_value_heads": None}  # D / N, and N

_GEMMA3 = Family(
    "Gemma 3 (text)",
    "Gemma3ForCausalLM",
    {
        "vocab_size": 262_208,
        _CONTEXT: 131_072,
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
        {"head_dim": 128, _CONTEXT: 32_768},
        _read_qwen3,
        _write_qwen3,
    ),
    "qwen2": Family(
        "Qwen2 and Qwen2.5",
        "Qwen2ForCausalLM",
        {"head_dim": None, _CONTEXT: 32_768},
        _read_qwen2,
        _write_qwen2,
    ),
    "llama": Family(
        "Llama 2 and 3 and SmolLM2",
        "LlamaForCausalLM",
        {**_FROM_SIZES, "rope_theta": 1e4, _CONTEXT: 2048},
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
            _CONTEXT: 131_072,
        },
        _read_mistral,
        _write_mistral,
    ),
    "gemma3_text": _GEMMA3,
}
_MULTIMODAL = {"gemma3": "gemma3_text"}  # read as its text part


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
        if (folder / "adapter_config.json").exists():
            said = read_json_object(folder / "adapter_config.json")
            base = said.get("base_model_name_or_path") or said.get("model")  # of PEFT, of mlx-lm
            named = f", {short(base)}," if isinstance(base, str) else ""
            raise DitError(
                f"'{folder}' is an adapter and no base model: give the model that it was trained on{named} as the "
                "base (--base), and this folder as --diff or --adapter"
            )
        with explain_os_errors("read", folder):
            what = what_checkpoint(entry.name for entry in folder.iterdir())
        if what:
            raise DitError(f"'{folder}' {what}")
        raise DitError(f"{path} does not exist: a model is a folder in Hugging Face format")
    with explain_os_errors("read", folder):
        adapter = adapter_file(entry.name for entry in folder.iterdir())
    if adapter:
        raise DitError(
            f"'{folder}' holds a model and an adapter ({adapter}), of which a base has no part: move the adapter with "
            "its adapter_config.json to a folder of its own, and give that as --diff or --adapter"
        )
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], where: str) -> DecoderConfig:
    """The `DecoderConfig` of a `config.json`'s content. Raises DitError that names what is not supported."""
    kind = raw.get("model_type")
    text_part = isinstance(kind, str) and kind in _MULTIMODAL
    kind = _MULTIMODAL[str(kind)] if text_part else kind
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = ", ".join(f"{family.title} ({name!r})" for name, family in FAMILIES.items())
        raise DitError(
            f"{where}: model_type {kind!r} is not supported{what_it_is(kind)}. Supported are {known}: use a model of "
            "one of these families"
        )
    raw = {**family.absent, **family.flat(raw, where)}
    for key in _MUST_BE_OFF:
        if raw.get(key):
            raise DitError(f"{where}: {key} {raw[key]!r} is not supported")
    # Without it transformers lets tokens see later ones, in every family.
    if not raw.get("is_causal", True):
        raise DitError(
            f"{where}: is_causal {raw['is_causal']!r} is not supported: use a causal model"
        )
    if raw.get("transformers_weights"):  # transformers takes that file, whatever others there are
        raise DitError(
            f"{where}: 'transformers_weights' {raw['transformers_weights']!r} is not supported: call that file "
            "model.safetensors, and remove the entry"
        )
    if raw.get("quantization_config"):
        raise DitError(f"{where} has a 'quantization_config': {QUANTISED}")
    for key in (*EXPERTS, "layer_scales"):
        if raw.get(key):
            raise DitError(f"{where}: {key!r} is not supported: use a dense model")
    fields: dict[str, Any] = {}
    for key in _SIZES:
        value = raw.get(key)
        if value is None and key == "num_key_value_heads" and key in family.absent:
            value = raw.get("num_attention_heads")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise DitError(f"{where}: {key!r} must be a positive integer, not {value!r}")
        fields[key] = value
    head_dim = raw["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    if fields["num_hidden_layers"] > MAX_LAYERS:
        raise DitError(f"{where}: more than {MAX_LAYERS} layers are not supported")
    fields |= family.read(raw, where)
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
    context = raw[_CONTEXT]
    if not isinstance(context, int) or isinstance(context, bool) or not 0 < context < 2**31:
        raise DitError(f"{where}: {_CONTEXT!r} must be a positive integer, not {context!r}")
    theta, scaling = read_rope(raw, where)
    common = {
        "head_dim": head_dim,
        "rms_norm_eps": float(eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        _CONTEXT: context,
        "tie_word_embeddings": tied,
    }
    return DecoderConfig(**{**fields, **common, "model_type": kind, "text_part": text_part})


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of this architecture, as transformers >= 5 writes it."""
    family = FAMILIES[config.model_type]
    return {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in _SIZES},
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        **({_CONTEXT: config.max_position_embeddings} if config.max_position_embeddings else {}),
        "rope_parameters": _rope_parameters(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        **family.write(config),
        "dtype": config.dtype,
    }


def _rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    default = {"rope_theta": config.rope_theta, "rope_type": "default"}
    return {**default, **dict(config.rope_scaling)}
