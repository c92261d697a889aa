"""Shapes of Qwen3 models: read from `config.json`, or one of the released sizes by name."""

import dataclasses
import pathlib
from typing import Any

from dit_jax.errors import DitError
from dit_jax.formats.files import read_json_object

# The implementations in dit_jax.models.attention, and the platform that each needs.
ATTENTION = {"xla": "", "cudnn": "gpu", "splash": "tpu"}

# Of a config's section `model`: how to compute, see DecoderConfig.
COMPUTE = ("scan_layers", "remat", "attention")

DTYPES = ("float32", "bfloat16")

MAX_LAYERS = 1_000

_INT_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a dense Qwen3, plus how to compute it. Hashable, so it can be a static argument.

    The first block are the fields of Hugging Face's `config.json`. The second block never changes the
    function that is computed: `dtype` is the compute dtype, `scan_layers` compiles one layer and loops,
    `remat` recomputes activations in the backward pass ("none", "full", or "dots": all but the projections' outputs),
    `attention` picks the implementation ("xla"; "cudnn" on GPUs, "splash" on TPUs).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False

    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self) -> None:
        """Raises DitError for a way to compute that does not exist."""
        for name, known in (
            ("dtype", DTYPES),
            ("remat", ("none", "full", "dots")),
            ("attention", ATTENTION),
        ):
            if getattr(self, name) not in known:
                raise DitError(
                    f"unknown {name} {getattr(self, name)!r}: choose from {', '.join(known)}"
                )
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise DitError(
                "attention 'cudnn' computes in bfloat16 only: choose that dtype or 'xla'"
            )

    def check_platform(self, platform: str) -> None:
        """Raises DitError where a way to compute does not exist on a platform ("cpu", "gpu", "tpu")."""
        needed = ATTENTION[self.attention]
        if needed not in ("", platform):
            raise DitError(
                f"attention {self.attention!r} needs a {needed.upper()}, and this is a {platform.upper()}: "
                "choose 'xla'"
            )

    def num_projection_parameters(self) -> int:
        """Number of parameters of the projections of all layers."""
        d = self.hidden_size
        heads = self.num_attention_heads + self.num_key_value_heads
        return self.num_hidden_layers * d * (2 * heads * self.head_dim + 3 * self.intermediate_size)

    def num_parameters(self) -> int:
        """Number of parameters, counting a tied head once."""
        d = self.hidden_size
        norms = self.num_hidden_layers * (2 * d + 2 * self.head_dim) + d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return self.num_projection_parameters() + norms + embeddings

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this architecture, as transformers >= 5 writes it."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "dtype": self.dtype,
        }


def _released(hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
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


NAMED_CONFIGS = {
    "qwen3-0.6b": _released(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _released(2048, 6144, 28, 16, True),
    "qwen3-4b": _released(2560, 9728, 36, 32, True),
    "qwen3-8b": _released(4096, 12288, 36, 32, False),
    "qwen3-14b": _released(5120, 17408, 40, 40, False),
    "qwen3-32b": _released(5120, 25600, 64, 64, False),
}


def read_config(folder: str | pathlib.Path) -> DecoderConfig:
    """Reads `config.json` of a Hugging Face folder.

    Raises:
        DitError: the file is missing or no JSON, or it describes something this program does not
            compute exactly (another architecture, rope scaling, sliding windows, biases, quantised weights).
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.exists():
        raise DitError(f"{path} does not exist: a model is a folder in Hugging Face format")
    return parse_config(read_json_object(path), str(path))


def parse_config(raw: dict[str, Any], where: str) -> DecoderConfig:
    """Turns the content of a `config.json` into a `DecoderConfig`; refuses by name what is not supported."""
    if raw.get("model_type") != "qwen3":
        raise DitError(
            f"{where}: model_type {raw.get('model_type')!r} is not supported: dense Qwen3 ('qwen3') is"
        )
    for key in ("quantization_config", "num_experts", "layer_scales"):
        if raw.get(key):
            raise DitError(
                f"{where}: {key!r} is not supported: use a dense model with plain weights"
            )
    if raw.get("attention_bias"):
        raise DitError(f"{where}: attention_bias=true is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise DitError(f"{where}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    layer_types = raw.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise DitError(f"{where}: 'layer_types' must be a list, not {layer_types!r}")
    if raw.get("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise DitError(f"{where}: sliding-window attention is not supported")

    fields: dict[str, Any] = {}
    for field, key in _INT_FIELDS.items():
        value = raw.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise DitError(f"{where}: {key!r} must be a positive integer, not {value!r}")
        fields[field] = value
    # Absent, it is the default of transformers.
    head_dim = raw.get("head_dim", 128) or fields["hidden_size"] // fields["num_attention_heads"]
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
    return DecoderConfig(
        head_dim=head_dim,
        rms_norm_eps=float(eps),
        rope_theta=_rope_theta(raw, where),
        tie_word_embeddings=tied,
        **fields,
    )


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
