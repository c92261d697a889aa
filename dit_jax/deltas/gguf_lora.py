"""LoRAs in GGUF files, as llama.cpp's `convert_lora_to_gguf.py` writes them."""

from collections.abc import Callable
from pathlib import Path as FilePath

import numpy as np

from dit_jax.deltas.factors import Factors, stack_factors
from dit_jax.deltas.raw_diff import RawDiff, check_values, projection_size
from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.formats.gguf_file import GgufFile
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import check_rank
from dit_jax.models.file_names import locate
from dit_jax.models.gguf_checkpoint import ARCHITECTURES, hf_name, undo_row_order
from dit_jax.models.misfits import shape_error
from dit_jax.models.modules import Path

_A, _B = ".weight.lora_a", ".weight.lora_b"
# Of these, the last two say what the LoRA is for.
_KNOWN = ("type", "lora.alpha", "lora.task_name", "lora.prompt_prefix")


def read_gguf_lora(path: FilePath, config: DecoderConfig) -> RawDiff:
    """The LoRA in a file; its scale is adapter.lora.alpha / rank (1 where alpha is 0, as in llama.cpp).

    Raises:
        DitError: the file holds a whole model or a LoRA that does not fit this one, half a pair of factors, or values
            that are not finite.
    """
    file = GgufFile(path)
    if file.metadata.get("general.type") != "adapter":
        raise DitError(
            f"'{path}' is a GGUF file of {short(file.metadata.get('general.type', 'model'))}, not of a LoRA: the diff "
            "of a whole model is read from its folder in Hugging Face format"
        )
    if file.metadata.get("adapter.type", "lora") != "lora":
        raise DitError(
            f"'{path}' is an adapter of type {short(file.metadata['adapter.type'])}: only 'lora' is read"
        )
    for key, value in file.metadata.items():
        if key.startswith("adapter.") and key.removeprefix("adapter.") not in _KNOWN:
            raise DitError(
                f"'{path}': {short(key)} = {short(value)} is not supported: the LoRA may act after certain tokens "
                "only, so it is no weight diff"
            )
    if config.model_type not in ARCHITECTURES.get(str(file.architecture), ()):
        raise DitError(
            f"'{path}' is a LoRA of the architecture {short(file.architecture)}, this model is of {config.model_type}: "
            "use the model that it was made for"
        )
    alpha = file.metadata.get("adapter.lora.alpha", 0)
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise DitError(
            f"'{path}': adapter.lora.alpha is {short(alpha)} instead of a finite number: get the file again"
        )
    shapes = file.shapes()
    heads = (config.num_attention_heads, config.num_key_value_heads)
    found: dict[tuple[Path, int], Callable[[], Factors]] = {}
    for name in shapes:
        stem = name.removesuffix(_A).removesuffix(_B)
        if stem == name or stem + _A not in shapes or stem + _B not in shapes:
            raise DitError(f"'{path}': {short(name)} is no pair of LoRA factors: get another file")
        if name.endswith(_B):
            continue
        module = hf_name(f"{stem}.weight", file.architecture, path).removesuffix(".weight")
        where, layer = locate(module, config, path)
        inputs, outputs = projection_size(where, module, config, path)
        rank = shapes[name][0] if shapes[name] else 0
        check_rank(rank, inputs, outputs, name, path)
        for factor, wanted in ((_A, (rank, inputs)), (_B, (outputs, rank))):
            if shapes[stem + factor] != wanted:
                raise shape_error(path, stem + factor, shapes[stem + factor], wanted)
        assert layer is not None  # a projection stands in a layer

        def read(stem: str = stem, module: str = module, rank: int = rank) -> Factors:
            a = check_values(file.read(stem + _A), stem + _A, path)
            b = check_values(file.read(stem + _B), stem + _B, path)
            b = undo_row_order(b, f"{module}.weight", file.architecture, heads)
            return Factors(
                np.ascontiguousarray(a.T), np.ascontiguousarray(b.T), alpha / rank or 1.0
            )

        found[where, layer] = read
    return RawDiff(stack_factors(found, config, path), kind="diff")
