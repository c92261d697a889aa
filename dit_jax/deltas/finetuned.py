"""Reads full finetunes as weight diffs: δ = M' − M over all parameters, dense or as a truncated SVD."""

import pathlib
from typing import Any

from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.deltas.reference_pt import read_pt_state_dict
from dit_jax.deltas.whole_weights import Weights, difference
from dit_jax.errors import DitError
from dit_jax.formats.files import check_links, file_inside, read_json_object, regular_file
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.formats.weight_files import open_weights
from dit_jax.models.decoder_config import ARCHITECTURE, DecoderConfig
from dit_jax.models.families import parse_config
from dit_jax.models.misfits import resized


def read_finetuned(
    path: str | pathlib.Path,
    config: DecoderConfig,
    base_params: Any,
    svd_rank: int | None = None,
    align: bool = False,
) -> RawDiff:
    """The difference between a finetuned model and the base.

    Args:
        path: a folder in Hugging Face format (one file or shards), or a file with a state dict, `.pt` or
            `.safetensors`.
        config: architecture of the base.
        base_params: parameters of the base (docs/architecture.md), numpy or jax arrays.
        svd_rank: None for the dense difference of all parameters, in the dtype of the base. Otherwise the rank of its
            best approximation on the projections, a LoRA in float32; `metadata["svd"]` has the share of the squared
            norm that this keeps.
        align: undo rewritings of the model that leave its function as it is, see `alignment`; `metadata["aligned"]`
            says which were found.

    Raises:
        DitError: the architecture is another one, tensors are missing, unknown or misshapen, hold NaN or infinity, or
            all equal the base.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() == ".safetensors":
        file = SafetensorsFile(regular_file(path))
        weights = Weights(path, file.shapes(), file.read, missing="kinds")
        return _read(weights, config, base_params, svd_rank, align)
    if path.is_file():
        if align:
            raise DitError(
                f"'{path}' cannot be aligned: save it as a model folder or a .safetensors file first"
            )
        return read_pt_state_dict(path, config, base_params, svd_rank)
    theirs = read_own_config(path)
    for field in ARCHITECTURE:
        found, wanted = getattr(theirs, field), getattr(config, field)
        if found != wanted:
            remedy = "use the base that it was made from"
            if field == "rope_scaling":
                found, wanted = dict(found) or None, dict(wanted) or None
                remedy = f"{remedy}, or remove 'rope_scaling' from its config.json if only long texts need it"
            if field == "vocab_size":
                remedy = resized(found, wanted)
            raise DitError(
                f"'{path}' is not a finetune of this model: its {field} is {found}, the base has {wanted}: {remedy}"
            )
    folder = open_weights(path)
    weights = Weights(path, folder.shapes(), folder.read, "nothing", theirs.tie_word_embeddings)
    return _read(weights, config, base_params, svd_rank, align)


def _read(
    weights: Weights, config: DecoderConfig, base_params: Any, svd_rank: int | None, align: bool
) -> RawDiff:
    facts = {}
    if align:
        from dit_jax.deltas.alignment import aligned  # which needs the decoder

        weights, facts["aligned"] = aligned(weights, config, base_params)
    delta, metadata = difference(weights, config, base_params, svd_rank)
    return RawDiff(delta, metadata={**metadata, **facts})


def read_own_config(folder: pathlib.Path) -> DecoderConfig:
    """The architecture of a finetuned model. Raises DitError: see `parse_config` and `check_links`."""
    check_links(folder)
    where = file_inside(folder, "config.json")
    return parse_config(read_json_object(where), str(where))
