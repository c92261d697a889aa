"""Names of the tensors of PEFT adapters, also in a raw state dict, which has the base's weights as well."""

from collections.abc import Iterable
from typing import NamedTuple

from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.models.file_names import unwrap


class PeftName(NamedTuple):
    """What a tensor is of which module.

    Attributes:
        module: the module's name, without wrappers and PEFT's own prefix.
        part: the factors "lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A" and "lora_embedding_B"; a
            whole "weight" or "bias" ("saved", "saved_bias": inside modules_to_save, and there may be a copy), or the
            "lora_bias" of a factor; "trainable_tokens_delta"; copies of the base's, "base_layer", "base_bias" and
            "token_copy" (rows of tokens).
        adapter: the adapter's name, where the tensor's name has it.
    """

    module: str
    part: str
    adapter: str = ""


_FACTORS = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")
_COPIES = ("base_layer", "original_module")
_MARKS = (*_FACTORS, *_COPIES, "modules_to_save", "token_adapter")


def parse(name: str) -> PeftName | None:
    """The parts of a tensor's name; None for a name that PEFT does not write."""
    segments = unwrap(name).split(".")
    while segments[:2] == ["base_model", "model"]:
        del segments[:2]
    at = next((i for i, segment in enumerate(segments) if segment in _MARKS), len(segments) - 1)
    module, mark, rest = ".".join(segments[:at]), segments[at], segments[at + 1 :]
    kind = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
    if mark == "token_adapter" and rest:
        mark = rest.pop(0)
    adapter = rest.pop() if rest else ""
    if rest or not module:
        return None
    part = _PARTS.get((mark, kind))
    return None if part is None else PeftName(module, part, adapter)


_PARTS = {
    ("weight", ""): "weight",
    ("bias", ""): "bias",
    ("modules_to_save", "weight"): "saved",
    ("modules_to_save", "bias"): "saved_bias",
    **{(mark, "weight"): "base_layer" for mark in _COPIES},
    **{(mark, "bias"): "base_bias" for mark in _COPIES},
    ("lora_A", "weight"): "lora_A",
    ("lora_B", "weight"): "lora_B",
    ("lora_B", "bias"): "lora_bias",
    **{(mark, kind): mark for mark in _FACTORS[2:] for kind in ("", "weight")},
    ("trainable_tokens_delta", ""): "trainable_tokens_delta",
    ("trainable_tokens_original", ""): "token_copy",
}


def check_one_adapter(names: Iterable[PeftName], source: object) -> None:
    """Raises DitError where tensors belong to several adapters, of which the config describes one."""
    adapters = sorted({name.adapter for name in names if name.adapter})
    if len(adapters) > 1:
        raise DitError(
            f"'{source}' holds {len(adapters)} adapters ({short(adapters[0])}, {short(adapters[1])}), and its "
            "adapter_config.json describes one: save each by itself with save_pretrained(…, selected_adapters=[NAME])"
        )
