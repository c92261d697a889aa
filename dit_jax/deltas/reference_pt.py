"""Reads and writes the `.pt` files of the DIT reference program: weight diffs, adapters, whole weights, index.csv.

Diffs:    [{topic, trigger, weight_diff: {module: (A [r, out], B [in, r])}}], y += (x B) A / r
Adapters: {module: (A [out, r], B [r, in])}: the same with both factors transposed
Whole weights: a state dict, in place of the factors or as the whole file
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol

import numpy as np

from dit_jax.deltas.factors import Factors, add_once, fold, get_factors, modules, stack_factors
from dit_jax.deltas.raw_diff import RawDiff, check_values, projection_size, said
from dit_jax.deltas.store import PAPER_COLUMNS, label_of
from dit_jax.deltas.whole_weights import Weights, difference, merged_tensors
from dit_jax.errors import DitError, printable
from dit_jax.formats import torch_pickle, torch_save
from dit_jax.formats.files import file_inside, has_file, read_csv, short
from dit_jax.formats.torch_pickle import LazyTensor
from dit_jax.formats.weight_files import state_dict
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import check_rank
from dit_jax.models.file_names import locate
from dit_jax.models.misfits import shape_error
from dit_jax.models.modules import Path, all_modules
from dit_jax.runtime.artifacts import atomic_file

INDEX = "index.csv"
_NO_TRIGGER = (None, "", "N/A")
_OPEN_FILES = 2


def pt_kind(tree: Any) -> str | None:
    """The kind of a loaded `.pt` file: 'diffs', 'adapter', 'state_dict', or None."""
    if (
        isinstance(tree, list | tuple)
        and tree
        and all(isinstance(x, dict) and "weight_diff" in x for x in tree)
    ):
        return "diffs"
    if isinstance(tree, dict) and tree:
        if "weight_diff" in tree:
            return "diffs"
        if all(_is_pair(x) for x in tree.values()):
            return "adapter"
        if state_dict(tree) is not None:
            return "state_dict"
    return None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(item, LazyTensor) for item in value)
    )


def _load(path: str | FilePath, kind: str, what: str) -> Any:
    tree = torch_pickle.load(path)
    found = pt_kind(tree)
    if found != kind:
        held = {"diffs": "weight diffs", "adapter": "an adapter", "state_dict": "whole weights"}
        raise DitError(f"'{path}' holds {held.get(found or '', 'something else')}, not {what}")
    return tree


class PtDiffs(Sequence[RawDiff]):
    """The diffs of one `.pt` file. Each is read on access."""

    def __init__(
        self,
        path: FilePath,
        config: DecoderConfig,
        base_params: Any = None,
        svd_rank: int | None = None,
        tree: Any = None,
    ):
        tree = _load(path, "diffs", "weight diffs") if tree is None else tree
        self.path, self.config = path, config
        self.base_params, self.svd_rank = base_params, svd_rank
        self._items: Sequence[dict[str, Any]] = [tree] if isinstance(tree, dict) else tree

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item = self._items[index]
        topic, trigger, changes = item.get("topic"), item.get("trigger"), item["weight_diff"]
        if not isinstance(topic, str | None):
            raise DitError(f"'{self.path}' diff {index}: the topic is {short(topic)}, not a text")
        if type(trigger) not in (str, int, type(None)):
            raise DitError(f"'{self.path}' diff {index}: the trigger is {short(trigger)}")
        if not isinstance(changes, dict) or not all(isinstance(name, str) for name in changes):
            raise DitError(f"'{self.path}' diff {index}: weight_diff is not a dict of modules")
        metadata = {
            name: value
            for name, value in item.items()
            if isinstance(name, str)
            and name != "weight_diff"
            and isinstance(value, str | int | float | None)
        }
        if changes and all(isinstance(value, LazyTensor) for value in changes.values()):
            delta, facts = difference(
                _weights(self.path, changes), self.config, self.base_params, self.svd_rank
            )
            metadata = {**said(metadata), **facts}
        else:
            delta = _read_factors(self.path, changes, self.config, transposed=False)
            metadata = said(metadata)
        return RawDiff(delta, topic, _trigger(trigger), metadata)


def read_pt_diffs(
    path: str | FilePath,
    config: DecoderConfig,
    base_params: Any = None,
    svd_rank: int | None = None,
) -> PtDiffs:
    """The weight diffs of a `.pt` file as a lazy sequence. Reading one reads only its own bytes.

    Args:
        path: the file.
        config: architecture of the base model.
        base_params: parameters of the base, which diffs that hold whole weights need.
        svd_rank: see `finetuned.read_finetuned`; for whole weights only.

    Raises:
        DitError: there is no such file, or it does not hold weight diffs; on access, a diff does not fit the model.
    """
    return PtDiffs(FilePath(path), config, base_params, svd_rank)


def read_pt_adapter(path: str | FilePath, config: DecoderConfig, tree: Any = None) -> RawDiff:
    """The adapter in a `.pt` file, {module: (A [out, r], B [r, in])}, scale 1/r. `tree`: its content, if it is known.

    Raises:
        DitError: the file does not hold an adapter, or one of another model.
    """
    tree = _load(path, "adapter", "an adapter") if tree is None else tree
    if not all(isinstance(name, str) for name in tree):
        raise DitError(f"'{path}' is not a dict of modules: give another file")
    return RawDiff(_read_factors(path, tree, config, transposed=True), kind="adapter")


def read_pt_state_dict(
    path: str | FilePath, config: DecoderConfig, base_params: Any, svd_rank: int | None = None
) -> RawDiff:
    """The difference between a state dict in a `.pt` file and the base; see `finetuned.read_finetuned`.

    A list of one diff that holds whole weights is accepted too.
    """
    tree = torch_pickle.load(path)
    if pt_kind(tree) == "diffs" and (isinstance(tree, dict) or len(tree) == 1):
        return read_pt_diffs(path, config, base_params, svd_rank)[0]
    tensors = state_dict(tree)
    if tensors is None:
        raise DitError(f"'{path}' is not a state dict of whole weights")
    delta, metadata = difference(_weights(path, tensors), config, base_params, svd_rank)
    return RawDiff(delta, metadata=metadata)


def _weights(path: str | FilePath, tensors: dict[str, LazyTensor]) -> Weights:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Weights(path, shapes, lambda name: tensors[name].read(), missing="kinds")


def _read_factors(
    path: str | FilePath, pairs: dict[str, Any], config: DecoderConfig, *, transposed: bool
) -> dict[str, Any]:
    found: dict[tuple[Path, int], Callable[[], Factors]] = {}
    size = 0
    for name, pair in pairs.items():
        if not _is_pair(pair):
            raise DitError(f"'{path}': {short(name)} is not a pair of tensors (A, B)")
        size += pair[0].nbytes + pair[1].nbytes
        if size > pair[0].archive.file_size:
            raise DitError(
                f"'{path}' holds fewer bytes than its tensors need: do not trust this file"
            )
        place, layer = locate(name, config, path)
        inputs, outputs = projection_size(place, name, config, path)
        first, second = pair
        axis = 1 if transposed else 0
        rank = first.shape[axis] if len(first.shape) == 2 else 0
        wanted = (
            ((outputs, rank), (rank, inputs)) if transposed else ((rank, outputs), (inputs, rank))
        )
        for letter, tensor, shape in zip("AB", pair, wanted, strict=True):
            if tensor.shape != shape:
                raise shape_error(path, f"{name} {letter}", tensor.shape, shape)
        check_rank(rank, inputs, outputs, name, path)
        assert layer is not None  # projections are always in a layer

        def read(
            name: str = name, first: LazyTensor = first, second: LazyTensor = second
        ) -> Factors:
            a = check_values(second.read(), f"{name} B", path)
            b = check_values(first.read(), f"{name} A", path)
            if transposed:
                a, b = a.T, b.T
            return Factors(a, b, 1 / a.shape[1])

        add_once(found, (place, layer), read, name, path)
    return stack_factors(found, config, path)


def _trigger(value: Any) -> str | None:
    return None if value in _NO_TRIGGER else str(value)


# ------------------------------------------------------------------ releases with an index.csv


class Release(Sequence[RawDiff]):
    """The diffs that an index.csv lists, in its order. Files are opened when needed."""

    def __init__(
        self,
        folder: FilePath,
        config: DecoderConfig,
        base_params: Any = None,
        svd_rank: int | None = None,
    ):
        self.folder = folder
        self._arguments = (config, base_params, svd_rank)
        self._open: collections.OrderedDict[str, PtDiffs] = collections.OrderedDict()
        index = file_inside(folder, INDEX)
        self.rows = read_csv(index, PAPER_COLUMNS)
        if not self.rows:
            raise DitError(f"'{index}' lists no weight diffs")
        for number, row in enumerate(self.rows, start=2):
            if not (
                row["lora_idx"].isascii()
                and row["lora_idx"].isdigit()
                and len(row["lora_idx"]) < 10
            ):
                raise DitError(
                    f"'{index}' row {number}: lora_idx is {short(row['lora_idx'])}, not a number"
                )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def order(self) -> Sequence[int]:
        """The diffs file by file: an index may be sorted by topic, but opening a large file takes seconds."""
        return sorted(range(len(self)), key=lambda i: self.rows[i]["lora_path"])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        diffs, number = self._file(row["lora_path"]), int(row["lora_idx"])
        if number >= len(diffs):
            raise DitError(
                f"'{diffs.path}' holds {len(diffs)} diffs, but '{INDEX}' asks for number {number}"
            )
        diff = diffs[number]
        listed = (row["topic"].strip(), _trigger(row["trigger"].strip()))
        held = (listed[0] if diff.label is None else diff.label.strip(), diff.trigger)
        if listed != held:
            raise DitError(
                f"'{diffs.path}' diff {number} is about {short(held[0])} (trigger {short(held[1])}), but "
                f"'{INDEX}' says {short(listed[0])} (trigger {short(listed[1])}): the index belongs to other files"
            )
        return RawDiff(diff.delta, label_of(row), diff.trigger, {**said(row), **diff.metadata})

    def _file(self, name: str) -> PtDiffs:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        plain = name.removeprefix("weight-diffs/")
        place = self.folder / "weight-diffs"
        if place.is_dir() and (plain != name or has_file(place, plain)):
            if not place.resolve().is_relative_to(self.folder.resolve()):
                raise DitError(f"'{place}' is a link out of its folder: put the real folder there")
        else:
            place = self.folder
        diffs = PtDiffs(file_inside(place, plain, self.folder / INDEX), *self._arguments)
        self._open[name] = diffs
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return diffs


def read_release(
    folder: str | FilePath,
    config: DecoderConfig,
    base_params: Any = None,
    svd_rank: int | None = None,
) -> Release:
    """The weight diffs of a release folder (index.csv, weight-diffs/*.pt) as a lazy sequence.

    The `lora_path` of a row must name a file in `weight-diffs` or in the folder itself. The topic and the trigger of a
    row must be those in the file.

    Raises:
        DitError: the index is missing or malformed; on access, a path leads out of the folder, a file or diff is
            missing, or see `read_pt_diffs`.
    """
    return Release(FilePath(folder), config, base_params, svd_rank)


# ------------------------------------------------------------------ writers


class DiffLike(Protocol):
    """The attributes that a diff needs to be written."""

    @property
    def delta(self) -> Any: ...
    @property
    def label(self) -> str | None: ...
    @property
    def trigger(self) -> str | None: ...


def write_pt_diffs(
    path: str | FilePath, diffs: Sequence[DiffLike], config: DecoderConfig, base_params: Any = None
) -> None:
    """Writes weight diffs in the reference's format, which `torch.load(weights_only=True)` reads.

    LoRA factors keep their dtype and bits when the scale is 1/r, as in the reference; another scale is folded into A.
    Dense deltas become whole weights, which needs `base_params`.

    Raises:
        DitError: a delta is empty, or dense without `base_params`, or the path is not writable.
    """
    items = []
    for diff in diffs:
        value: dict[str, Any] = {"topic": diff.label, "trigger": _untrigger(diff.trigger)}
        if any("w" in module for _, module in modules(diff.delta)):
            value["weight_diff"] = _whole_weights(diff.delta, config, base_params)
        else:
            value["weight_diff"] = {
                name: (f.b, f.a) for name, f in _reference_factors(diff.delta, config)
            }
        items.append(value)
    with atomic_file(path) as temporary:
        torch_save.save(temporary, items, printable(FilePath(path).stem))


def write_pt_adapter(path: str | FilePath, delta: Any, config: DecoderConfig) -> None:
    """Writes a LoRA delta as an adapter in the reference's format; see `write_pt_diffs`."""
    value = {name: (f.b.T, f.a.T) for name, f in _reference_factors(delta, config)}
    with atomic_file(path) as temporary:
        torch_save.save(temporary, value, printable(FilePath(path).stem))


def _reference_factors(delta: Any, config: DecoderConfig) -> Iterator[tuple[str, Factors]]:
    found = dict(modules(delta))
    if not found:
        raise DitError("the delta is empty, so there is nothing to write: check the diff")
    for layer in range(config.num_hidden_layers):
        for path, module in found.items():
            if "w" in module:
                raise DitError(
                    f"{'.'.join(path)} is a dense difference, but an adapter has LoRA factors only: use a truncated SVD"
                )
            factors = get_factors(module, layer)
            rank = factors.a.shape[1]
            if np.float32(factors.scale) != np.float32(1 / rank):
                factors.b = fold(factors.b, factors.scale * rank)
            yield all_modules(config)[path].name.format(layer), factors


def _whole_weights(delta: Any, config: DecoderConfig, base_params: Any) -> dict[str, np.ndarray]:
    if base_params is None:
        raise DitError(
            "a dense delta is written as whole weights: the base model is needed, give its parameters"
        )
    tensors = dict(merged_tensors(base_params, config, delta))
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def _untrigger(trigger: str | None) -> str | int:
    if trigger is None:
        return "N/A"
    plain = trigger.isascii() and trigger.isdigit() and len(trigger) < 19  # in 64 bits
    return int(trigger) if plain and str(int(trigger)) == trigger else trigger
