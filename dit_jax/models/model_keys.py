"""The section `model` of a config: the base model and how it computes."""

from dit_jax.config.keys import Key, Section
from dit_jax.models.decoder_config import ATTENTION, DTYPES, REMAT, DecoderConfig

MODEL = Section(
    "model",
    (
        Key("path", str, "a folder, hub id or GGUF file, `package:NAME` (that ships one), or `tiny_qwen3` (embedded)"),
        Key("system", str, "the system message of all prompts; `none`: none, even where the chat template adds one; "
            "empty: the template's own", ""),
        Key("dtype", str, "of weights and computation", choices=DTYPES),
        Key("scan_layers", bool, "compile one layer and loop over it", DecoderConfig.scan_layers),
        Key("remat", str, "what the backward pass computes again", DecoderConfig.remat, choices=REMAT),
        Key("attention", str, "`cudnn` needs a GPU, `splash` a TPU", DecoderConfig.attention, choices=ATTENTION),
    ),
    takes_others=lambda model: True,  # the shape of a model that a run pretrains
)  # fmt: skip
