"""The tensors of a model folder in Hugging Face format: one file or shards, safetensors or torch.

The files are untrusted: torch files are read by `torch_pickle`, which executes nothing, and shards are plain names in
the folder.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats import torch_pickle
from dit_jax.formats.files import file_inside, has_file, is_plain_name, read_json_object, short
from dit_jax.formats.recognise import what_folder
from dit_jax.formats.safetensors_file import SafetensorsFile

INDEX = ".index.json"
# In the order in which transformers looks for them: one file, or the index of shards.
_FILES = ("model.safetensors", "pytorch_model.bin")
_CANDIDATES = tuple(name for file in _FILES for name in (file, file + INDEX))
_SHARD = re.compile(
    r"(?:model|pytorch_model)-(\d{1,6})-of-(\d{1,6})\.(?:safetensors|bin)", re.ASCII
)


# Under which programs save the weights of a model, beside the states of a trainer.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")


class Tensors(Protocol):
    """Named tensors of one or several files."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, known without reading values."""

    def dtypes(self) -> dict[str, np.dtype]:
        """The dtype of each tensor."""

    def read(self, name: str) -> np.ndarray:
        """The values, in the dtype of the file."""


class TorchFile:
    """The tensors of a state dict that torch.save wrote, also one inside a checkpoint {"model": {…}, …}.

    Raises:
        DitError: not such a file, damaged, or an entry that is no tensor.
    """

    def __init__(self, path: Path, tree: Any = None):
        self.path = path
        tree = torch_pickle.load(path) if tree is None else tree
        tensors = state_dict(tree)
        if tensors is None:
            held = "no tensors" if not isinstance(tree, dict) else "other things than tensors"
            raise DitError(f"'{path}' holds {held}: give a file with a state dict")
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        return {name: tensor.dtype for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].read()


def state_dict(tree: Any) -> dict[str, torch_pickle.LazyTensor] | None:
    """The state dict in what a torch file holds: the whole of it, or the one entry that programs put it into.

    Raises:
        DitError: another entry has weights of the same names, such as a running mean of the model's.
    """
    if not isinstance(tree, dict) or _is_state_dict(tree):
        return tree if isinstance(tree, dict) else None
    key = next((key for key in _STATE_KEYS if _is_state_dict(tree.get(key))), None)
    if key is None:
        return None
    found: dict[str, torch_pickle.LazyTensor] = tree[key]
    for other, value in tree.items():
        if other != key and _is_state_dict(value) and value.keys() & found.keys():
            path = next(iter(found.values())).archive.path
            raise DitError(
                f"'{path}' holds two models, {short(key)} and {short(other)}: save the one that you want by itself"
            )
    return found


def _is_state_dict(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and len(tree) > 0
        and all(isinstance(name, str) for name in tree)
        and all(isinstance(value, torch_pickle.LazyTensor) for value in tree.values())
    )


class Shards:
    """The tensors of several files, by the name of each."""

    def __init__(self, files: Mapping[str, Tensors]):
        self._files = files

    def shapes(self) -> dict[str, tuple[int, ...]]:
        held = {id(file): file.shapes() for file in self._files.values()}
        return {name: held[id(file)][name] for name, file in self._files.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        held = {id(file): file.dtypes() for file in self._files.values()}
        return {name: held[id(file)][name] for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)


def weight_file(names: Collection[str]) -> str | None:
    """The file that `open_weights` begins with in a folder of these files: the weights, an index, or a shard."""
    for name in _CANDIDATES:
        if name in names:
            return name
    return min((name for name in names if _SHARD.fullmatch(name)), default=None)


def listed_shards(index: Path) -> dict[str, str]:
    """Tensor name -> file name of an index.

    Raises:
        DitError: not an index, or it names what is no plain name of a weight file.
    """
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(v, str) for v in weight_map.values()
    ):
        raise DitError(f"{index}: 'weight_map' must map tensor names to file names")
    suffix = ".bin" if index.name.endswith(f".bin{INDEX}") else ".safetensors"
    for shard in sorted(set(weight_map.values())):
        # `files.check_links` has checked that files of this suffix lie inside an untrusted folder.
        if not is_plain_name(shard) or not shard.endswith(suffix):
            raise DitError(
                f"{index} names the file {short(shard)}, which is not a plain file name that ends in '{suffix}'"
            )
    return dict(weight_map)


def open_weights(folder: Path) -> Tensors:
    """Opens the weights of a folder in Hugging Face format.

    Raises:
        DitError: there are none, shards are missing, or the index names files outside the folder or tensors that do
            not exist.
    """
    first = next((name for name in _CANDIDATES if has_file(folder, name)), None)
    if first is None:
        try:
            names = [entry.name for entry in folder.iterdir()]
        except OSError as error:
            raise DitError(f"cannot read '{folder}': {error.strerror}") from None
        first = weight_file(names)
        if first is None and (what := what_folder(names)):
            raise DitError(f"'{folder}' {what}")
    if first is None:
        raise DitError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json (nor pytorch_model.bin)"
        )
    if first.endswith(INDEX):
        return _open_shards(folder, listed_shards(folder / first))
    if match := _SHARD.fullmatch(first):
        return _open_numbered(folder, first, int(match[2]))
    return _open_file(folder, first)


def _open_file(folder: Path, name: str) -> Tensors:
    path = folder / name
    return SafetensorsFile(path) if name.endswith(".safetensors") else TorchFile(path)


def _check_there(folder: Path, wanted: Iterable[str]) -> None:
    wanted = sorted(set(wanted))
    missing = [name for name in wanted if not has_file(folder, name)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DitError(
            f"'{folder}' lacks the shard {short(missing[0])}{more}, {len(missing)} of {len(wanted)} are missing: the "
            "download is not complete, get it again"
        )


def _open_shards(folder: Path, weight_map: dict[str, str]) -> Tensors:
    _check_there(folder, weight_map.values())
    files = {shard: _open_file(folder, shard) for shard in sorted(set(weight_map.values()))}
    held = {shard: file.shapes() for shard, file in files.items()}
    for shard, shapes in held.items():
        unlisted = [name for name in shapes if weight_map.get(name) != shard]
        if unlisted:
            raise DitError(
                f"'{folder / shard}' holds {short(unlisted[0])}, which the index does not list there: get both again"
            )
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise DitError(
                f"'{folder / shard}' lacks {short(name)}, which the index promises: get both again"
            )
    return Shards({name: files[shard] for name, shard in weight_map.items()})


def _open_numbered(folder: Path, first: str, count: int) -> Tensors:
    """Shards without an index: their numbers say whether all are there."""
    start, suffix = first.partition("-")[0], Path(first).suffix
    if not 0 < count <= 10_000:
        raise DitError(f"'{folder}' has the shard {short(first)} and no index: get it again")
    width = len(first.split("-")[1])
    names = [f"{start}-{i:0{width}d}-of-{count:0{width}d}{suffix}" for i in range(1, count + 1)]
    _check_there(folder, names)
    found: dict[str, Tensors] = {}
    for name in names:
        file = _open_file(folder, file_inside(folder, name).name)
        for tensor in file.shapes():
            if tensor in found:
                raise DitError(f"'{folder / name}' holds {short(tensor)}, which another shard has")
            found[tensor] = file
    return Shards(found)
