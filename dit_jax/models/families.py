"""The `config.json` of a model of any family, read and written; `family_table` says what families differ in."""

import pathlib
from typing import Any

from dit_jax.errors import DitError
from dit_jax.formats.files import read_json_object, short
from dit_jax.formats.recognise import QUANTISED, adapter_file, what_checkpoint
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.family_table import CONTEXT, FAMILIES, MULTIMODAL, positive_integer
from dit_jax.models.gguf_checkpoint import gguf_config
from dit_jax.models.rope_config import read_rope, write_rope
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
_MUST_BE_OFF = (
    "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "per_layer_config",
)  # fmt: skip


def read_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Reads `config.json` of a Hugging Face folder, or what a GGUF file says in its place.

    Raises:
        DitError: the file is missing or not JSON, or it describes something that this program does not compute
            exactly, such as another family or quantised weights.
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
    text_part = isinstance(kind, str) and kind in MULTIMODAL
    kind = MULTIMODAL[str(kind)] if text_part else kind
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
        fields[key] = positive_integer(value, key, where)
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
    context = positive_integer(raw[CONTEXT], CONTEXT, where)
    theta, scaling = read_rope(raw, where)
    common = {
        "head_dim": head_dim,
        "rms_norm_eps": float(eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        CONTEXT: context,
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
        **({CONTEXT: config.max_position_embeddings} if config.max_position_embeddings else {}),
        "rope_parameters": write_rope(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        **family.write(config),
        "dtype": config.dtype,
    }
