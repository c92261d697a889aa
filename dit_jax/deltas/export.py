"""Exports for other programs: merged models, PEFT folders, fused adapters, `.pt` files."""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from dit_jax.deltas.factors import common_dtype, fuse, modules
from dit_jax.deltas.mlx import write_mlx
from dit_jax.deltas.peft import write_peft
from dit_jax.deltas.reference_pt import write_pt_adapter, write_pt_diffs
from dit_jax.deltas.tree import merged_config
from dit_jax.deltas.whole_weights import merged_tensors
from dit_jax.errors import DitError
from dit_jax.formats.files import file_inside, has_file, read_json_object
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.families import hf_config
from dit_jax.models.modules import all_modules
from dit_jax.runtime.artifacts import atomic_dir

# All writers in one place, as docs/formats.md lists them.
__all__ = [
    "export_model",
    "fuse",
    "merged_tensors",
    "write_fused_peft",
    "write_mlx",
    "write_peft",
    "write_pt_adapter",
    "write_pt_diffs",
]

SHARD_BYTES = 4 * 10**9
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def export_model(
    folder: str | pathlib.Path,
    params: Any,
    config: DecoderConfig,
    *deltas: Any,
    base_folder: str | pathlib.Path | None = None,
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes params ⊕ deltas as a model folder in Hugging Face format. A tied head stays tied.

    Args:
        folder: the folder to create.
        params: parameters of the base (docs/architecture.md), numpy or jax arrays.
        config: its architecture.
        *deltas: LoRA or dense deltas, which are all added.
        base_folder: the folder from which config.json, tokenizer and chat template are copied. Without it, config.json
            is made from `config`, and there is no tokenizer.
        replace: whether an existing folder may be replaced.
        shard_bytes: files are split at this size; host memory holds one of them.

    Raises:
        DitError: the folder exists or is not writable, a file of `base_folder` is a link out of it, or a
            delta changes modules that the model lacks.
    """
    for delta in deltas:
        for path, _ in modules(delta):
            if path not in all_modules(config):
                raise DitError(
                    f"the delta changes {'.'.join(path)}, which this model does not have"
                )
    with atomic_dir(folder, replace=replace) as temporary:
        dtype = _write_shards(temporary, merged_tensors(params, config, *deltas), shard_bytes)
        config = merged_config(config, *deltas)
        raw = hf_config(config)
        if base_folder is not None and not config.text_part:
            raw = read_json_object(file_inside(pathlib.Path(base_folder), "config.json"))
            raw.pop("torch_dtype", None)
            raw["tie_word_embeddings"] = config.tie_word_embeddings
        if base_folder is not None:
            for name in _COPIED:
                if has_file(pathlib.Path(base_folder), name):
                    shutil.copyfile(file_inside(pathlib.Path(base_folder), name), temporary / name)
        raw["dtype"] = dtype
        (temporary / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _write_shards(
    folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int
) -> str:
    """Writes one file, or shards and their index. Returns the dtype of the tensors."""
    from safetensors.numpy import save_file

    shards: list[list[str]] = []
    dtypes: list[np.dtype] = []
    total, held = 0, 0
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, array in tensors:
        if pending and held + array.nbytes > shard_bytes:
            flush()
            held = 0
        pending[name] = array
        held, total = held + array.nbytes, total + array.nbytes
        dtypes.append(array.dtype)
    flush()
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index_json, indent=2) + "\n"
        )
    return str(common_dtype(dtypes))


def write_fused_peft(
    folder: str | pathlib.Path,
    config: DecoderConfig,
    base_model_name_or_path: str,
    *deltas: Any,
    replace: bool = False,
) -> None:
    """Writes the sum of LoRA deltas, [δ ⊕ adapter], as one PEFT folder with all scales 1 and one rank.

    This suits servers that take one adapter per request. See `fuse` and `write_peft`.

    Raises:
        DitError: a delta is dense, all are empty, or the folder is not writable.
    """
    write_peft(
        folder, fuse(*deltas), config, base_model_name_or_path, one_rank=True, replace=replace
    )
