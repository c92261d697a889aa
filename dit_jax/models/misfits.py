"""What a tensor that does not fit the model says about its file, and the command that mends the file."""

import re
import shlex
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.formats.recognise import QUANTISED
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.file_names import unwrap
from dit_jax.models.text_part import is_vision

# Buffers that are computed here, or that belong to a program: they are left out.
_HARMLESS = re.compile(
    r"\.rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$|\._extra_state$"
)
_OTHER_HEADS = re.compile(
    r"(^|\.)(score|classifier|classification_head|qa_outputs|v_head|value_head|q_head|reward_head"
    r"|rm_head|regression_head|regression_layer)(\.|$)"
)
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|biases|absmax|quant_map|SCB|weight_packed|weight_scale(_inv)?"
    r"|quant_state\..*)$"
)
_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|lm_head)\.")


def is_ignored(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor takes no part in text: angles that old Llamas store, images where the model is a text part."""
    return _HARMLESS.search(name) is not None or (config.text_part and is_vision(unwrap(name)))


def tensor_error(source: object, name: str, shape: Iterable[int] = ()) -> DitError | None:
    """What a tensor says that no module of a language model has; None where it says nothing in particular."""
    if 0 in (shape := tuple(shape)):
        return DitError(
            f"'{source}': {short(name)} is empty (shape {list(shape)}): DeepSpeed ZeRO-3 saved it without gathering "
            "the weights; run 'python zero_to_fp32.py . OUT' in the checkpoint's folder and give OUT, or save again "
            "with stage3_gather_16bit_weights_on_model_save"
        )
    if "_flat_param" in name:
        return DitError(
            f"'{source}' holds {short(name)}, which FSDP has flattened: save again with FULL_STATE_DICT "
            "(accelerate: fsdp_state_dict_type), or join a sharded checkpoint with 'accelerate merge-weights IN OUT'"
        )
    if head := _OTHER_HEADS.search(name):
        return DitError(
            f"'{source}' holds {short(name)}, the head of a classifier, reward or value model, which is no causal "
            f"language model. {_without_head(Path(str(source)), head[2])}"
        )
    if "lora_" in name:
        return DitError(
            f"'{source}' holds {short(name)}, a factor of a LoRA: its scale is in adapter_config.json, so give the "
            "folder that has both (the file is called adapter_model.safetensors or .bin there)"
        )
    if _QUANTISED.search(name):
        return DitError(f"'{source}' holds {short(name)}: {QUANTISED}")
    return None


def _without_head(source: Path, head: str) -> str:
    """How the rest of a file or folder becomes a diff: the head takes no part in text."""
    keep = f"{{k: v for k, v in s.load_file(f).items() if '{head}.' not in k}}"
    given = shlex.quote(str(source))
    if source.suffix == ".safetensors":
        return (
            'Without that head the rest can be read: python -c "import sys, safetensors.torch as s; '
            f"f = sys.argv[1]; s.save_file({keep}, f, {{'format': 'pt'}})\" {given}"
        )
    if source.is_dir():
        return (
            'Without that head its body can be compared with the base: python -c "import sys, torch, transformers as '
            f"t; torch.save(t.AutoModel.from_pretrained(sys.argv[1]).state_dict(), 'body.pt')\" {given} and give "
            "body.pt"
        )
    return (
        "Without that head its body can be compared with the base: remove its tensors from the file"
    )


def shape_error(
    source: object, name: str, found: Iterable[int], wanted: Iterable[int], remedy: str = ""
) -> DitError:
    """A DitError that names both shapes, and what the difference says about the file."""
    found, wanted = tuple(found), tuple(wanted)
    if 0 in found and (error := tensor_error(source, name, found)):
        return error
    if _VOCABULARY.search(f"{name}.") and len(found) == len(wanted) == 2 and found[1] == wanted[1]:
        return DitError(
            f"'{source}': {short(name)} has shape {list(found)}, this model needs {list(wanted)}: "
            f"{resized(found[0], wanted[0])}"
        )
    if len(found) == 1 and len(wanted) == 2 and found[0] in (prod(wanted), 0):
        remedy = "FSDP has flattened it; save again with FULL_STATE_DICT"
    remedy = remedy or "use the model that the file was made for"
    return DitError(
        f"'{source}': {short(name)} has shape {list(found)}, this model needs {list(wanted)}: {remedy}"
    )


def resized(found: int, wanted: int) -> str:
    """What a vocabulary of another size means, and how to give the base the same."""
    return (
        f"tokens were added to the vocabulary of {wanted} (or it was cut or padded), so resize the base too: python "
        f"-c \"from transformers import AutoModelForCausalLM as A; m = A.from_pretrained('BASE'); "
        f"m.resize_token_embeddings({found}); m.save_pretrained('RESIZED')\", with the finetune's tokenizer files"
    )


def check_names(
    source: object, unknown: Iterable[str], shapes: Mapping[str, Iterable[int]]
) -> None:
    """Raises DitError for the first tensor of no module that says what its file is."""
    for name in unknown:
        if error := tensor_error(source, name, shapes[name]):
            raise error
