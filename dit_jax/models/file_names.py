"""Tensor names as other programs write them, and which weight of the model each one means.

torch.compile, DDP, FSDP, activation checkpointing, DeepSpeed and PEFT add segments of their own to names, in any order
and depth. No module of a model is called like one of them, so they are left out wherever they stand.
"""

import functools
import re

from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import Module, Path, all_modules

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DDP or DeepSpeed",
    "_module": "Opacus",
    "_forward_module": "Lightning Fabric",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}

# What may stand before a model's own names: PEFT, TRL, and models that hold this one as their text part.
_NAME = re.compile(
    r"(?:(?:base_model|pretrained_model|model|language_model)\.){0,6}"
    r"(?:layers\.(?P<layer>[0-9]{1,6})\.)?(?P<rest>[a-z_.]+)"
)


def unwrap(name: str) -> str:
    """A name without the segments of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def locate(name: str, config: DecoderConfig, source: object) -> tuple[Path, int | None]:
    """The path of a module in the delta tree and its layer (None outside the layers), by the module's name.

    Raises:
        DitError: the model has no such module or layer; `source` names the file.
    """
    module, layer = _find(name, config)
    if module is None:
        raise DitError(
            f"'{source}' changes {short(name)}, which is no module of this model (for example "
            "'model.layers.0.self_attn.q_proj'): use the model that the file was made for"
        )
    if layer is not None and layer >= module.layers:
        raise DitError(
            f"'{source}' changes {short(name)}, but the model has {module.layers} layers: "
            "use the model that the file was made for"
        )
    return module.path, layer


def find_tensor(name: str, config: DecoderConfig) -> tuple[Module, int | None] | None:
    """The module, and its layer, of which a tensor is the weight or the bias; None: of no module of the model."""
    stem, _, kind = unwrap(name).rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    stem = stem.removesuffix(".base_layer")  # how PEFT calls a layer that has an adapter
    module, layer = _find(stem if kind == "weight" else f"{stem}.bias", config)
    if module is None or (layer is not None and layer >= module.layers):
        return None
    return module, layer


def _find(name: str, config: DecoderConfig) -> tuple[Module | None, int | None]:
    match = _NAME.fullmatch(unwrap(name))
    if match is None:
        return None, None
    layer = match["layer"]
    key = match["rest"] if layer is None else f"layers.{{}}.{match['rest']}"
    return _by_name(config).get(key), None if layer is None else int(layer)


@functools.lru_cache
def _by_name(config: DecoderConfig) -> dict[str, Module]:
    return {module.name.removeprefix("model."): module for module in all_modules(config).values()}
