"""The config of a decoder: its architecture, and how to compute it."""

import dataclasses

from dit_jax.errors import DitError

# The implementations in dit_jax.models.attention, and the platform that each needs ("" for any).
ATTENTION = {"xla": "", "cudnn": "gpu", "splash": "tpu"}

# The fields that say how to compute; a config's section `model` sets them.
COMPUTE = ("scan_layers", "remat", "attention")

DTYPES = ("float32", "bfloat16")

REMAT = ("none", "full", "dots")

WINDOWED = "sliding_attention"  # of `layer_types`


# The entries of a `rope_scaling`, sorted.
Scaling = tuple[tuple[str, float | str], ...]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture, and how to compute it. Hashable, so it can be a static argument.

    The fields of the first block are those of Hugging Face's `config.json`. `model_type` is a key of
    `family_table.FAMILIES`, and the second block says what that family computes in its own way. The third block never
    changes the function that is computed: `dtype` is the compute dtype, `scan_layers` compiles one layer and loops,
    `remat` recomputes activations in the backward pass ("none", "full", or "dots": all but the projections' outputs),
    `attention` picks the implementation ("xla"; "cudnn" on GPUs, "splash" on TPUs).

    Attributes:
        rope_scaling: the entries of config.json's object of that name as sorted pairs; () for plain angles.
        sliding_window: how many tokens a query of a windowed layer sees, itself included; 0: no layer has a window.
        layer_types: for each layer "sliding_attention" (windowed) or "full_attention"; (): all are alike.
        rope_local_base_freq: the theta of the windowed layers, whose rope is then not scaled; 0: as in the others.
        biases: the projections that have one.
        qk_norm: whether queries and keys are normalised.
        sandwich_norm: whether attention and MLP are normalised before and after.
        unit_offset_norm: whether norms multiply by 1 + scale, in fp32.
        scale_embeddings: whether embeddings are multiplied by sqrt(hidden_size).
        hidden_act: of the MLP, "silu" or "gelu_pytorch_tanh".
        query_pre_attn_scalar: attention scores are divided by its square root; 0: by that of `head_dim`.
        max_position_embeddings: how many tokens the model was made for, prompt and answer together; 0: not said.
        text_part: whether this is the text part of a multimodal model, which has other tensors too.
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
    model_type: str = "qwen3"

    rope_scaling: Scaling = ()
    sliding_window: int = 0
    layer_types: tuple[str, ...] = ()
    rope_local_base_freq: float = 0.0
    biases: tuple[str, ...] = ()
    qk_norm: bool = True
    sandwich_norm: bool = False
    unit_offset_norm: bool = False
    scale_embeddings: bool = False
    hidden_act: str = "silu"
    query_pre_attn_scalar: float = 0.0
    max_position_embeddings: int = 0
    text_part: bool = False

    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "xla"

    def __post_init__(self) -> None:
        """Raises DitError for an unknown way to compute."""
        for name, known in (
            ("dtype", DTYPES),
            ("remat", REMAT),
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
        """Raises DitError if the platform ("cpu", "gpu", "tpu") lacks the implementation of attention."""
        needed = ATTENTION[self.attention]
        if needed not in ("", platform):
            raise DitError(
                f"attention {self.attention!r} needs a {needed.upper()}, but this is a {platform.upper()}: "
                "choose 'xla'"
            )


# In which a finetune may differ from its base; an untied head is then part of the diff.
_MAY_DIFFER = ("max_position_embeddings", "text_part", "dtype", "tie_word_embeddings", *COMPUTE)
# A finetune must equal its base in these fields.
ARCHITECTURE = (
    "model_type",
    *(
        field.name
        for field in dataclasses.fields(DecoderConfig)
        if field.name not in ("model_type", *_MAY_DIFFER)
    ),
)
