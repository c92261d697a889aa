"""Reads and writes PEFT LoRA folders: adapter_config.json and adapter_model.safetensors.

lora_A.weight [r, in] and lora_B.weight [out, r] are our factors transposed. The scale is lora_alpha / r, or
lora_alpha / sqrt(r) with rsLoRA. Options that change what the adapter computes are applied, or refused by name.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from dit_jax.deltas import peft_names
from dit_jax.deltas.factors import (
    Factors,
    add_once,
    common_dtype,
    get_factors,
    modules,
    stack_factors,
)
from dit_jax.deltas.peft_config import PeftOptions
from dit_jax.deltas.peft_dense import DenseChanges, Tensor
from dit_jax.deltas.raw_diff import RawDiff, check_values, projection_size
from dit_jax.errors import DitError
from dit_jax.formats import torch_pickle
from dit_jax.formats.files import file_inside, has_file, read_json_object, short
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import check_rank
from dit_jax.models.file_names import find_tensor, locate
from dit_jax.models.misfits import is_ignored, shape_error, tensor_error
from dit_jax.models.modules import EMBEDDING, HEAD, Path, all_modules, projections, set_at
from dit_jax.runtime.artifacts import atomic_dir

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
MAX_CONFIG_BYTES = 8 * 2**20


def read_peft(folder: str | FilePath, config: DecoderConfig, base_params: Any = None) -> RawDiff:
    """Reads a LoRA that PEFT saved as a delta.

    Supported are r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, target_modules (names, a regular expression,
    all-linear), exclude_modules, layers_to_transform and layers_pattern; and as dense differences (`peft_dense`)
    use_dora, modules_to_save, trainable_token_indices, and LoRA on the embedding and the head. Everything else that
    changes the result is refused by name.

    Args:
        folder: the folder with adapter_config.json and adapter_model.safetensors (or .bin).
        config: architecture of the base model.
        base_params: its parameters, which everything but LoRA on projections needs.

    Raises:
        DitError: files are missing or malformed, options are not supported, tensors do not fit the model or the
            config, or tensors that the config asks for are missing.
    """
    return read_tensors(*open_peft(FilePath(folder)), config, base_params)


def open_peft(folder: FilePath) -> tuple[PeftOptions, FilePath, dict[str, Tensor]]:
    """The options, the file with the tensors, and these, of which no values are read yet.

    Raises:
        DitError: files are missing or malformed, or options are not supported.
    """
    where = file_inside(folder, CONFIG)
    options = PeftOptions(read_json_object(where, MAX_CONFIG_BYTES), where)
    return options, *_open(folder)


def read_tensors(
    options: PeftOptions,
    source: FilePath,
    tensors: dict[str, Tensor],
    config: DecoderConfig,
    base_params: Any,
) -> RawDiff:
    """The delta of tensors with PEFT's names; see `read_peft`."""
    by_module = _by_module(tensors, config, source)

    found: dict[tuple[Path, int], Callable[[], Factors]] = {}
    places: set[tuple[Path, int | None]] = set()
    dense = DenseChanges(options, config, base_params, source)
    for module, parts in by_module.items():
        if biases := {part: parts.pop(part) for part in _BIASES if part in parts}:
            dense.add_bias(module, *_locate_bias(module, config, source, biases), biases)
            if not parts:
                continue
        place, layer = locate(module, config, source)
        places.add((place, layer))
        if options.dora != ("lora_magnitude_vector" in parts) and "lora_A" in parts:
            raise DitError(
                f"'{source}': use_dora is {options.dora}, but the lora_magnitude_vector of "
                f"{short(module)} is {'missing' if options.dora else 'present'}: get the complete folder"
            )
        if all_modules(config)[place].lora and "lora_magnitude_vector" not in parts:
            if copy := parts.pop("base_layer", None):
                dense.add_copy(module, place, layer, copy)
                if not parts:
                    continue
            if parts.keys() <= {"lora_A", "lora_B"}:
                read = _reader(module, place, parts, options, config, source)
                assert layer is not None  # projections are always in a layer
                add_once(found, (place, layer), read, module, source)
                continue
        dense.add(module, place, layer, parts)
    _check_complete(places, by_module, options, config, source)
    delta = stack_factors(found, config, source) if found else {}
    by_factors = {path for path, _ in found}
    for path, changed in modules(dense.delta()):
        if path in by_factors:
            raise DitError(
                f"'{source}' changes {path[-1]} both by factors and by whole weights, which is not supported"
            )
        set_at(delta, path, changed)
    if not delta:
        raise DitError(
            f"'{source}' changes no module of this model: check that it is a weight diff for it"
        )
    base = options.raw.get("base_model_name_or_path")
    metadata: dict[str, Any] = {}
    if isinstance(base, str):
        metadata["base_model_name_or_path"] = base
    if dense.notes:
        metadata["notes"] = dense.notes
    return RawDiff(delta, metadata=metadata, kind="adapter")


_BIASES = ("bias", "base_bias", "saved_bias", "lora_bias")


def _by_module(
    tensors: dict[str, Tensor], config: DecoderConfig, source: FilePath
) -> dict[str, dict[str, Tensor]]:
    """module -> part -> tensor, by the names in the file."""
    if not tensors:
        raise DitError(f"'{source}' holds no tensors: save the adapter again")
    by_module: dict[str, dict[str, Tensor]] = {}
    parsed = {name: peft_names.parse(name) for name in tensors if not is_ignored(name, config)}
    peft_names.check_one_adapter(filter(None, parsed.values()), source)
    for name, parts in parsed.items():
        empty = 0 in tensors[name].shape
        if ("lora_" not in name or empty) and (
            error := tensor_error(source, name, tensors[name].shape)
        ):
            raise error
        if parts is None:
            what = (
                "a bias (lora_bias) that PEFT does not have"
                if name.endswith(".bias")
                else "no part of a PEFT LoRA"
            )
            raise DitError(f"'{source}' holds {short(name)}, which is {what}: get the file again")
        add_once(by_module.setdefault(parts.module, {}), parts.part, tensors[name], name, source)
    return by_module


def _locate_bias(
    module: str, config: DecoderConfig, source: FilePath, parts: Iterable[str]
) -> tuple[Path, int]:
    located = find_tensor(f"{module}.bias", config)
    if located is None:
        locate(module, config, source)
        option = "lora_bias" if "lora_bias" in parts else "bias"
        raise DitError(
            f"'{source}' holds a bias of {short(module)} ({option}), and this model has none there: it is no diff of "
            "this model"
        )
    assert located[1] is not None  # projections are always in a layer
    return located[0].path, located[1]


def has_weights(folder: FilePath) -> bool:
    """Whether a folder has a file with the tensors of an adapter."""
    return has_file(folder, WEIGHTS) or has_file(folder, TORCH_WEIGHTS)


def _open(folder: FilePath) -> tuple[FilePath, dict[str, Tensor]]:
    if has_file(folder, WEIGHTS):
        path = file_inside(folder, WEIGHTS)
        file = SafetensorsFile(path)
        return path, {
            name: Tensor(file.shape(name), lambda name=name: file.read(name))  # type: ignore[misc]
            for name in file.names
        }
    if not has_file(folder, TORCH_WEIGHTS):
        raise DitError(
            f"'{folder}' has neither {WEIGHTS} nor {TORCH_WEIGHTS}: get the complete folder"
        )
    path = file_inside(folder, TORCH_WEIGHTS)
    tree = torch_pickle.load(path)
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise DitError(f"'{path}' is not a dict of tensors")
    for name, tensor in tree.items():
        if not isinstance(tensor, torch_pickle.LazyTensor):
            raise DitError(f"'{path}': {short(name)} is not a tensor")
    return path, {name: Tensor(tensor.shape, tensor.read) for name, tensor in tree.items()}


def _reader(
    module: str,
    place: Path,
    pair: dict[str, Tensor],
    options: PeftOptions,
    config: DecoderConfig,
    source: FilePath,
) -> Callable[[], Factors]:
    """Checks the shapes of a module's factors now; returns a function that reads them."""
    inputs, outputs = projection_size(place, module, config, source)
    for letter in ("lora_A", "lora_B"):
        if letter not in pair:
            raise DitError(f"'{source}' lacks {module}.{letter}.weight: get the complete folder")
    if not options.targets(module):
        raise DitError(
            f"'{source}' holds factors of {short(module)}, which {CONFIG} does not target"
        )
    rank, scale = options.rank(module), options.scale(module)
    check_rank(rank, inputs, outputs, module, source)
    for letter, wanted in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
        if pair[letter].shape != wanted:
            remedy = ""
            if sorted(pair[letter].shape)[:1] != [rank]:
                remedy = (
                    f"{CONFIG} says r = {rank} there, so it belongs to another adapter: get both files of one, or "
                    "correct r and rank_pattern"
                )
            name = f"{module}.{letter}.weight"
            raise shape_error(source, name, pair[letter].shape, wanted, remedy)

    def read() -> Factors:
        a = check_values(pair["lora_A"].read(), f"{module}.lora_A.weight", source)
        b = check_values(pair["lora_B"].read(), f"{module}.lora_B.weight", source)
        return Factors(a.T, b.T, scale)

    return read


def _check_complete(
    places: set[tuple[Path, int | None]],
    by_module: Iterable[str],
    options: PeftOptions,
    config: DecoderConfig,
    source: FilePath,
) -> None:
    """Refuses a file without what the config asks for: PEFT would fill it in with random numbers."""
    missing = [name for name in options.modules_to_save if not any(name in x for x in by_module)]
    rows = options.token_rows
    missing += [name for name in rows if not any(x.endswith(name) for x in by_module)]
    if config.tie_word_embeddings and len(set(map(tuple, rows.values()))) == 1:
        # Rows of tied weights are stored once.
        missing = [name for name in missing if name not in rows or len(missing) == len(rows)]
    # Prefixed as in the file: programs put different prefixes in front of the layers.
    in_layers = min((name for name in by_module if "layers." in name), default="model.layers.")
    prefix = in_layers[: in_layers.index("layers.")]
    wanted: dict[str, tuple[Path, int | None]] = {
        prefix + module.name.removeprefix("model.").format(layer): (module.path, layer)
        for module in projections(config).values()
        for layer in module.indices
    }
    if not options.all_linear:
        wanted |= {f"{prefix}embed_tokens": (EMBEDDING, None), "lm_head": (HEAD, None)}
    if by_module and options.target_modules is not None:
        missing += [
            name for name, at in wanted.items() if at not in places and options.targets(name)
        ]
    if missing:
        raise DitError(
            f"{CONFIG} targets {short(missing[0])}, but '{source}' lacks it: get the complete folder"
        )


# ------------------------------------------------------------------ writing


def write_peft(
    folder: str | FilePath,
    delta: Any,
    config: DecoderConfig,
    base_model_name_or_path: str,
    *,
    one_rank: bool = False,
    replace: bool = False,
) -> None:
    """Writes a LoRA delta as a PEFT folder; factors keep their dtype and bits.

    Layers whose factors are all zero are left out. So are trailing ranks that are zero in both factors, in all layers
    but one: reading the folder again pads to the largest rank of the projection.

    Args:
        folder: the folder to create.
        delta: LoRA factors only.
        config: architecture of the base model.
        base_model_name_or_path: the base that PEFT should load.
        one_rank: give every module in every layer the largest rank instead, filled up with zeros, for servers that
            read one rank and one alpha for all. Its scales must be equal.
        replace: whether an existing folder may be replaced.

    Raises:
        DitError: the delta is dense or empty, or the folder is not writable.
    """
    from safetensors.numpy import save_file

    factors: dict[str, Factors] = {}
    most = max((module["a"].shape[-1] for _, module in modules(delta) if "a" in module), default=0)
    for path, module in modules(delta):
        if "w" in module:
            raise DitError(
                f"{'.'.join(path)} is a dense difference: a PEFT adapter has LoRA factors only "
                "(use a truncated SVD of the finetuned model, or export the merged model)"
            )
        layers = [get_factors(module, i, trim=True) for i in range(config.num_hidden_layers)]
        ranks = [f.a.shape[1] for f in layers]
        largest = int(np.argmax(ranks))
        if ranks[largest] < module["a"].shape[-1]:
            layers[largest] = get_factors(module, largest)
        if one_rank:
            layers = [_padded(f, most) for f in layers]
        name = all_modules(config)[path].name
        if config.text_part:  # as the whole model has it
            name = name.replace("model.", "model.language_model.", 1)
        factors |= {name.format(layer): f for layer, f in enumerate(layers)}
    used = {name: f for name, f in factors.items() if f.a.shape[1]}
    if not used:
        raise DitError("the delta is empty, so there is nothing to write: check the diff")
    tensors = {}
    dtype = common_dtype(array.dtype for f in used.values() for array in (f.a, f.b))
    for name, f in used.items():
        # safetensors writes the raw buffer: a transposed view would be stored scrambled.
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(f.a.T)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(f.b.T)
    raw = _make_config(used, factors, base_model_name_or_path)
    with atomic_dir(folder, replace=replace) as temporary:
        metadata = {"format": "pt", "dtype": str(np.dtype(dtype))}
        save_file(tensors, temporary / WEIGHTS, metadata=metadata)
        (temporary / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _padded(factors: Factors, rank: int) -> Factors:
    extra = rank - factors.a.shape[1]
    a, b = np.pad(factors.a, ((0, 0), (0, extra))), np.pad(factors.b, ((0, extra), (0, 0)))
    return Factors(a, b, factors.scale)


def _make_config(used: dict[str, Factors], every: Iterable[str], base: str) -> dict[str, Any]:
    ranks = {name: f.a.shape[1] for name, f in used.items()}
    alphas = {name: _alpha(f.scale, ranks[name]) for name, f in used.items()}
    rank = _most_common(ranks.values())
    alpha = _most_common(alphas.values())
    # The last parts of names would be found in the vision tower of a multimodal model, too.
    whole = set(used) == set(every) and not any(".language_model." in name for name in used)
    targets = sorted({name.rpartition(".")[2] for name in used} if whole else used)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    }


def _most_common(values: Iterable[Any]) -> Any:
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


def _alpha(scale: float, rank: int) -> float:
    """The roundest alpha with float32(alpha / rank) == scale."""
    exact = scale * rank
    for digits in range(0, 12):
        alpha = round(exact, digits)
        if np.float32(alpha / rank) == np.float32(scale):
            return int(alpha) if alpha == int(alpha) else alpha
    return exact
