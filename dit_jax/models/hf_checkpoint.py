"""Qwen3 weights in Hugging Face format: folders of safetensors, read tensor by tensor and written back."""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import DitError, first_line
from dit_jax.formats.files import read_json_object
from dit_jax.models.decoder import Params, init_params
from dit_jax.models.decoder_config import DecoderConfig

TINY = "tiny_qwen3"  # the embedded model

_LAYER_MODULES = {
    "input_layernorm": ("input_layernorm",),
    "self_attn.q_proj": ("self_attn", "q_proj"),
    "self_attn.k_proj": ("self_attn", "k_proj"),
    "self_attn.v_proj": ("self_attn", "v_proj"),
    "self_attn.o_proj": ("self_attn", "o_proj"),
    "self_attn.q_norm": ("self_attn", "q_norm"),
    "self_attn.k_norm": ("self_attn", "k_norm"),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "mlp.gate_proj": ("mlp", "gate_proj"),
    "mlp.up_proj": ("mlp", "up_proj"),
    "mlp.down_proj": ("mlp", "down_proj"),
}
_TOP_MODULES = {
    "model.embed_tokens": ("embed_tokens",),
    "model.norm": ("norm",),
    "lm_head": ("lm_head",),
}


def tensor_names(config: DecoderConfig) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """Hugging Face tensor name -> (path of the leaf in the parameter tree, layer index or None)."""
    names: dict[str, tuple[tuple[str, ...], int | None]] = {}
    leaf = {"embed_tokens": "embedding", "norm": "scale", "lm_head": "kernel"}
    path: tuple[str, ...]
    for module, path in _TOP_MODULES.items():
        if not (module == "lm_head" and config.tie_word_embeddings):
            names[f"{module}.weight"] = ((*path, leaf[path[0]]), None)
    for layer in range(config.num_hidden_layers):
        for module, path in _LAYER_MODULES.items():
            kind = "kernel" if module.endswith("_proj") else "scale"
            names[f"model.layers.{layer}.{module}.weight"] = (("layers", *path, kind), layer)
    return names


def is_transposed(path: tuple[str, ...]) -> bool:
    """Whether the leaf is stored [in, out] here and [out, in] in Hugging Face files."""
    return path[-1] == "kernel"


def find_folder(name: str) -> pathlib.Path:
    """The folder of a model: the embedded one, a folder on disk, or a snapshot of a hub id.

    Raises:
        DitError: there is none of that name, here or on the hub.
    """
    if name == TINY:
        return pathlib.Path(__file__).parents[1] / "assets" / TINY
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DitError(
            f"no model folder {name!r}: give a folder in Hugging Face format, a hub id or {TINY!r}"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # network, authorisation, spelling: the library raises many kinds
        raise DitError(
            f"{name!r} is no folder here and cannot be had from the hub: {first_line(e)}"
        ) from None


def generation_eos(folder: pathlib.Path) -> list[int]:
    """End-of-text ids that `generation_config.json` of a model folder names; none without that file.

    Raises:
        DitError: the file is no JSON object.
    """
    path = folder / "generation_config.json"
    eos = read_json_object(path).get("eos_token_id") if path.exists() else None
    found = eos if isinstance(eos, list) else [eos]
    return [i for i in found if type(i) is int]


def load_params(
    folder: str | pathlib.Path,
    config: DecoderConfig,
    place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
) -> Params:
    """Reads the weights of a Hugging Face folder in `config.dtype`, one stacked leaf at a time.

    Args:
        place: called with (path, host array) for every leaf; returns the array to keep (on a device,
            sharded, …). Default: on jax's default device, which on a CPU is the host array itself. Host memory in
            use beside what is kept is one leaf at most.

    Raises:
        DitError: missing, unexpected or misshapen tensors (all are listed), or an unreadable file.
    """
    from dit_jax.formats.safetensors_file import SafetensorsFolder

    place = place or (lambda path, array: jax.device_put(array, may_alias=True))
    dtype = jnp.dtype(config.dtype)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    names = tensor_names(config)
    files = SafetensorsFolder(folder)
    _check(files.shapes(), names, shapes, config, str(folder))

    by_leaf: dict[tuple[str, ...], list[tuple[int | None, str]]] = {}
    for name, (path, layer) in names.items():
        by_leaf.setdefault(path, []).append((layer, name))
    params: Params = {}
    # Large leaves first: the second copy that each may have for a moment then meets the fewest others.
    for path, members in sorted(by_leaf.items(), key=lambda item: -_get(shapes, item[0]).size):
        target = _get(shapes, path)
        host = _aligned(target.shape, dtype)
        for layer, name in members:
            host[... if layer is None else layer] = _orient(path, files.read(name))
        _set(params, path, jax.block_until_ready(place(path, host)))
        del host  # before the next one is made
    return params


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that starts where jax on a CPU takes it as it is, a large one also where huge pages start."""
    size = math.prod(shape) * dtype.itemsize
    unit = 2 << 20 if size >= 4 << 20 else 64  # numpy asks for huge pages from 4 MiB on
    buffer = np.empty(size + unit, np.uint8)
    start = -buffer.ctypes.data % unit
    return buffer[start : start + size].view(dtype).reshape(shape)


def iterate_tensors(params: Params, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, host array in Hugging Face orientation), C-contiguous, in a stable order."""
    for name, (path, layer) in tensor_names(config).items():
        leaf = _get(params, path)
        # safetensors writes the raw buffer: a transposed view would be stored scrambled.
        yield (
            name,
            np.ascontiguousarray(_orient(path, np.asarray(leaf if layer is None else leaf[layer]))),
        )


def save_params(folder: str | pathlib.Path, params: Params, config: DecoderConfig) -> None:
    """Writes `config.json` and `model.safetensors` (one file) into an existing folder."""
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    save_file(
        dict(iterate_tensors(params, config)),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")


def _check(
    found: Mapping[str, tuple[int, ...]],
    names: Mapping[str, tuple[tuple[str, ...], int | None]],
    shapes: Params,
    config: DecoderConfig,
    folder: str,
) -> None:
    extra = set(found) - set(names)
    if config.tie_word_embeddings:
        extra.discard("lm_head.weight")  # some tools write the tied head a second time
    problems = [f"missing {name}" for name in names if name not in found]
    problems += [f"unexpected {name}" for name in sorted(extra)]
    for name, (path, layer) in names.items():
        shape = _get(shapes, path).shape
        want = shape if layer is None else shape[1:]
        want = tuple(reversed(want)) if is_transposed(path) else tuple(want)
        if name in found and tuple(found[name]) != want:
            problems.append(f"{name} has shape {list(found[name])}, config.json says {list(want)}")
    if problems:
        shown = "; ".join(problems[:6]) + (
            f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        )
        raise DitError(f"{folder}: the weights do not fit config.json: {shown}")


def _orient(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return array.T if is_transposed(path) else array


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
