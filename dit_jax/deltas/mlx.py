"""Reads and writes the adapters of mlx-lm: adapter_config.json and adapters.safetensors.

y += scale * (x lora_a) lora_b, with lora_a [in, r] and lora_b [r, out] (mlx_lm/tuner/lora.py), which are our factors.
PEFT's reader gets them as PEFT would have written them.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.deltas import peft
from dit_jax.deltas.factors import fuse, modules
from dit_jax.deltas.peft_config import PeftOptions
from dit_jax.deltas.peft_dense import Tensor
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.deltas.whole_weights import Weights, difference
from dit_jax.errors import DitError
from dit_jax.formats.files import file_inside, has_file, read_json_object, short
from dit_jax.formats.json_shape import is_number
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import all_modules
from dit_jax.runtime.artifacts import atomic_dir

CONFIG = peft.CONFIG  # mlx-lm chose the same name
WEIGHTS = "adapters.safetensors"
_OTHERS = re.compile(r"\d+_adapters\.safetensors|(\d+_)?adapters\.npz")

_IN_LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>[0-9]{1,6})\.(?P<key>.+)\.\w+$")

# The parts of a module -> PEFT's. Of an embedding, lora_a [V, r] are rows of tokens.
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING_PARTS = {
    "lora_a": "lora_embedding_A",
    "lora_b": "lora_embedding_B",
    "m": "lora_magnitude_vector",
}


def is_mlx(folder: Path) -> bool:
    """Whether a folder holds an adapter of mlx-lm and none of PEFT."""
    if not has_file(folder, CONFIG) or peft.has_weights(folder):
        return False
    return has_file(folder, WEIGHTS) or any(_OTHERS.fullmatch(x.name) for x in folder.iterdir())


def open_mlx(folder: Path) -> tuple[dict[str, Any], SafetensorsFile]:
    """The options and the file with the tensors, of which no values are read yet.

    Raises:
        DitError: files are missing or malformed, or the kind of finetuning is unknown.
    """
    where = file_inside(folder, CONFIG)
    raw = read_json_object(where, peft.MAX_CONFIG_BYTES)
    if not has_file(folder, WEIGHTS):
        others = sorted(x.name for x in folder.iterdir() if _OTHERS.fullmatch(x.name))
        remedy = (
            "convert it with a current mlx-lm"
            if others[-1].endswith(".npz")
            else f"copy the one that you want to {WEIGHTS}"
        )
        raise DitError(f"'{folder}' holds {short(others[-1])} and no {WEIGHTS}: {remedy}")
    if raw.get("fine_tune_type", "lora") not in ("lora", "dora", "full"):
        raise DitError(
            f"'{where}': fine_tune_type {short(raw['fine_tune_type'])} is not supported, only lora, dora and full: "
            "make a whole model with 'mlx_lm.fuse --dequantize' and give that as the diff"
        )
    return raw, SafetensorsFile(file_inside(folder, WEIGHTS))


def read_mlx(folder: str | Path, config: DecoderConfig, base_params: Any = None) -> RawDiff:
    """Reads an adapter of mlx-lm as a delta: LoRA, DoRA, or whole weights of the last layers (`full`).

    `scale` is that of the config, as mlx-lm takes it since version 0.20.

    Args:
        folder: the folder with adapter_config.json and adapters.safetensors.
        config: architecture of the base model.
        base_params: its parameters, which everything but LoRA on projections needs.

    Raises:
        DitError: see `open_mlx` and `peft.read_peft`.
    """
    folder = Path(folder)
    raw, file = open_mlx(folder)
    source = folder / WEIGHTS
    kind = raw.get("fine_tune_type", "dora" if raw.get("use_dora") is True else "lora")
    base = raw.get("model")
    metadata = {"base_model_name_or_path": base} if isinstance(base, str) else {}
    if kind == "full":
        weights = Weights(source, file.shapes(), file.read, missing="layers")
        delta, facts = difference(weights, config, base_params)
        return RawDiff(delta, metadata={**metadata, **facts}, kind="adapter")
    options, notes = _options(raw, kind, folder / CONFIG)
    _check_trained(raw, file.names, config, source)
    read = peft.read_tensors(options, source, _tensors(file, source), config, base_params)
    notes = [*read.metadata.get("notes", ()), *notes]
    return RawDiff(
        read.delta, metadata={**metadata, **({"notes": notes} if notes else {})}, kind="adapter"
    )


def _options(raw: dict[str, Any], kind: str, where: Path) -> tuple[PeftOptions, list[str]]:
    """What PEFT's config would say, and what a reader of the answers should know."""
    said = raw.get("lora_parameters")
    said = said if isinstance(said, dict) else {}
    rank: Any
    scale: Any
    rank, scale, alpha = (said.get(name) for name in ("rank", "scale", "alpha"))
    if (
        not (type(rank) is int and 1 <= rank <= 2**20 and is_number(scale))
        or not abs(scale * rank) < 1e30
    ):
        raise DitError(
            f"'{where}': lora_parameters must have a rank and a scale, not {short(rank)} and {short(scale)}: get the "
            "file again"
        )
    notes = []
    if isinstance(alpha, int | float) and alpha != rank and abs(alpha) < 1e30:
        notes.append(
            f"{where} has alpha {alpha}, which mlx-lm before 0.20 multiplied into the scale and later versions ignore, "
            f"as here: if an older one trained the adapter, set its scale to {scale * alpha / rank:g}"
        )
    like_peft = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "use_dora": kind == "dora",
        "ensure_weight_tying": True,  # a tied head follows its embedding
    }
    return PeftOptions(like_peft, where), notes


def _check_trained(
    raw: dict[str, Any], names: list[str], config: DecoderConfig, source: Path
) -> None:
    """Refuses factors of modules without a LoRA: mlx-lm would leave them out, and say nothing."""
    count, said = raw.get("num_layers", raw.get("lora_layers")), raw.get("lora_parameters")
    keys = said.get("keys") if isinstance(said, dict) else None
    first = config.num_hidden_layers - count if type(count) is int and count > 0 else 0
    for name in names:
        match = _IN_LAYER.search(name)
        if match is None:
            continue
        if int(match["layer"]) < first or (isinstance(keys, list) and match["key"] not in keys):
            raise DitError(
                f"'{source}' holds {short(name)}, which num_layers and keys in {CONFIG} do not name: get both files of "
                "one adapter"
            )


def _tensors(file: SafetensorsFile, source: Path) -> dict[str, Tensor]:
    """The tensors with PEFT's names and orientation."""
    found: dict[str, Tensor] = {}
    for name in file.names:
        module, _, part = name.rpartition(".")
        parts = _EMBEDDING_PARTS if module.endswith("embed_tokens") else _PARTS
        if part not in parts or not module:
            raise DitError(
                f"'{source}' holds {short(name)}, which is no part of a LoRA of mlx-lm: check fine_tune_type in "
                f"{CONFIG}"
            )
        found[f"{module}.{parts[part]}"] = Tensor(
            file.shape(name)[::-1],
            lambda name=name: file.read(name).T,  # type: ignore[misc]
        )
    return found


def write_mlx(
    folder: str | Path,
    delta: Any,
    config: DecoderConfig,
    base_model_name_or_path: str,
    *,
    replace: bool = False,
) -> None:
    """Writes a LoRA delta as an adapter folder of mlx-lm.

    mlx-lm has one rank and one scale: smaller ranks are padded with zeros, and scales that differ are folded into
    lora_b.

    Args:
        folder: the folder to create.
        delta: LoRA factors only.
        config: architecture of the base model.
        base_model_name_or_path: the base that mlx-lm should load.
        replace: whether an existing folder may be replaced.

    Raises:
        DitError: the delta is dense or empty, or the folder is not writable.
    """
    from safetensors.numpy import save_file

    for path, module in modules(delta):
        if "w" in module:
            raise DitError(
                f"{'.'.join(path)} is a dense difference: an adapter of mlx-lm has LoRA factors only (use a truncated "
                "SVD of the finetuned model, or export the merged model)"
            )
    scales = {float(scale) for _, module in modules(delta) for scale in module["scale"]}
    if len(scales) != 1:
        delta = fuse(delta)
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = max(module["a"].shape[-1] for _, module in modules(delta))
    tensors: dict[str, np.ndarray] = {}
    keys = []
    for path, module in modules(delta):
        name = all_modules(config)[path].name
        keys.append(name.partition(".{}.")[2])
        prefix = "language_model." if config.text_part else ""
        for layer in range(config.num_hidden_layers):
            a, b = np.asarray(module["a"][layer]), np.asarray(module["b"][layer])
            more = rank - a.shape[1]
            at = prefix + name.format(layer)
            tensors[f"{at}.lora_a"] = np.pad(a, ((0, 0), (0, more)))
            tensors[f"{at}.lora_b"] = np.pad(b, ((0, more), (0, 0)))
    raw = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
        "num_layers": config.num_hidden_layers,
        "model": base_model_name_or_path,
    }
    with atomic_dir(folder, replace=replace) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "mlx"})
        (temporary / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
