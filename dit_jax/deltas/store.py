"""The diff store: many labelled weight diffs of one base, as stacked shards and an index.

    STORE/manifest.json          format, base model digest, config, sha256 of every file
    STORE/index.csv              one row per diff, the paper's columns first (docs/formats.md)
    STORE/shards/00000.safetensors   leaves [n, L, …] of n diffs, named like "layers.mlp.up_proj.a"
    STORE/shards/00000.json          their index rows

One rename publishes a shard, so an interrupted run continues with the first missing shard.
"""

import contextlib
import gc
import pathlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.data.labels import NONE, normalise
from dit_jax.deltas.factors import stack_padded
from dit_jax.deltas.tree import is_lora, layout
from dit_jax.errors import DitError
from dit_jax.formats.files import file_inside, read_csv, short
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.json_shape import each, fits, optional
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import Delta, check_shapes
from dit_jax.runtime import artifacts
from dit_jax.runtime.outgoing import csv_text, from_cell

FORMAT = "dit_jax.diff_store"
_REPAIR = (
    "delete this file and run the stage 'diffs' again, which recreates it and keeps the others"
)
# What a manifest may say beside its files.
_TOLD = optional(config=optional(diffs=optional(kinds=each({}))))
MAX_DEPTH = 8  # how deep the dicts of a delta may be nested
# Of an index.csv of the paper's release, and the first ones of ours.
PAPER_COLUMNS = ("lora_path", "lora_idx", "n_params", "topic", "trigger", "split")
# A finetune's losses stand in the rows of its shard alone: in the index they would be most of what opening it reads.
CURVE = "ce_curve"
_NUMBER = re.compile(r"-?\d+\.\d+", re.ASCII)
# The columns that an adapter may be trained to say.
LABEL_COLUMNS = ("label", "topic", "trigger", "category", "behaviour", "split")


def flatten(delta: Delta) -> dict[str, Any]:
    """{"layers.mlp.up_proj.a": leaf, …}."""
    leaves = jax.tree_util.tree_flatten_with_path(delta)[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, Any]) -> Delta:
    """The inverse of `flatten`. Raises DitError for names that cannot be the leaves of one delta."""
    delta: dict[str, Any] = {}
    for name, leaf in leaves.items():
        node = delta
        *parents, last = name.split(".")
        for parent in parents[:MAX_DEPTH]:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if len(parents) > MAX_DEPTH or not isinstance(node, dict) or last in node:
            raise DitError(f"the leaf names of the diff contradict each other at {short(name)}")
        node[last] = leaf
    return delta


def _shard_files(store: pathlib.Path, shard: int) -> tuple[pathlib.Path, pathlib.Path]:
    return store / "shards" / f"{shard:05d}.safetensors", store / "shards" / f"{shard:05d}.json"


def write_shard(
    store: pathlib.Path, shard: int, stacked: Delta, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes one shard (leaves [n, L, …]) and its n index rows. The rows come last and mark it as complete."""
    from safetensors.numpy import save_file

    data, meta = _shard_files(store, shard)
    artifacts.make_dir(data.parent)
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(stacked).items()}
    with artifacts.atomic_file(data) as temporary:
        save_file(leaves, temporary)
    record = {"sha256": artifacts.digest_file(data), "rows": [dict(row) for row in rows]}
    artifacts.write_json(meta, record)


def shard_rows(store: pathlib.Path, shard: int) -> list[dict[str, Any]] | None:
    """Index rows of a complete shard; None if it is missing or damaged, and must be made again."""
    data, meta = _shard_files(store, shard)
    if not (data.is_file() and meta.is_file()):
        return None
    try:
        record = artifacts.read_json(meta)
        if artifacts.digest_file(data) == record["sha256"] and _are_rows(record["rows"]):
            return list(record["rows"])
    except (DitError, KeyError, TypeError):
        pass
    return None


def _are_rows(rows: Any) -> bool:
    """Whether rows of a file, which anybody may have edited, hold what an index can."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(value is None or isinstance(value, str | int | float) for value in row.values())
        and isinstance(row.get("gate_failed", ""), str)
        and isinstance(row.get(CURVE, ""), str)
        and all(map(_NUMBER.fullmatch, row.get(CURVE, "").split()))
        for row in rows
    )


def copy_shards(source: pathlib.Path, store: pathlib.Path) -> int:
    """Copies the complete shards of one folder that another lacks; returns how many.

    Raises:
        DitError: a shard of both folders differs, is damaged or lies elsewhere; or a file is no shard.
    """
    copied = 0
    for meta in sorted((source / "shards").glob("*.json")):
        shard = int(meta.stem) if meta.stem.isascii() and meta.stem.isdigit() else -1
        files = _shard_files(source, shard)
        if shard < 0 or files[1].name != meta.name:
            raise DitError(f"'{meta}' is no batch of diffs: move it away")
        for file in files:
            file_inside(source / "shards", file.name)
        if not meta.resolve().is_relative_to(source.resolve()):
            raise DitError(f"'{meta.parent}' is a link out of its run: put the real folder there")
        rows = shard_rows(source, shard)
        if rows is None:
            raise DitError(f"'{files[0]}' is damaged, or '{meta.name}' is: run that job again")
        found = shard_rows(store, shard)
        if found is not None:
            # `shard_rows` has checked the digests that stand in the records.
            records = [artifacts.read_json(_shard_files(x, shard)[1]) for x in (source, store)]
            if found != rows or records[0]["sha256"] != records[1]["sha256"]:
                raise DitError(
                    f"'{files[0]}' and '{_shard_files(store, shard)[0]}' are the same batch and hold different "
                    "diffs: gather one of the two jobs"
                )
            continue
        for old, new in zip(files, _shard_files(store, shard), strict=True):
            with artifacts.atomic_file(new) as temporary:
                shutil.copyfile(old, temporary)
        copied += 1
    return copied


def publish(store: pathlib.Path, shards: int, **fields: Any) -> None:
    """Writes index.csv and then the manifest, which marks the store as complete."""
    rows: list[dict[str, Any]] = []
    for shard in range(shards):
        found = shard_rows(store, shard)
        if found is None:
            raise DitError(
                f"{_shard_files(store, shard)[0]} is missing or damaged: run the stage 'diffs' again"
            )
        rows += [
            {**row, "lora_path": _shard_files(store, shard)[0].name, "lora_idx": i}
            for i, row in enumerate(found)
        ]
    columns = dict.fromkeys((*PAPER_COLUMNS, *(key for row in rows for key in row)))
    columns.pop(CURVE, None)
    artifacts.write_text(store / "index.csv", csv_text(rows, list(columns)))
    artifacts.write_manifest(store, FORMAT, shards=shards, **fields)


def failed(row: Mapping[str, Any]) -> bool:
    """Whether the gate found that a diff does not do what its label says."""
    return str(row.get("passed", "")).lower() in ("false", "0", "0.0")


def label_of(row: Mapping[str, Any], column: str = "label") -> str:
    """What an adapter should say about a diff.

    Args:
        row: a row of a store's index.
        column: "label", which the behaviour sets; or another column, such as "trigger" (paper, section 5.6), for diffs
            that have something to name.

    Raises:
        DitError: the row has nothing in that column.
    """
    label = row.get("label") or row["topic"]
    if column == "label" or label == NONE:
        return str(label)
    if not row.get(column):
        raise DitError(f"the diff of {row['topic']!r} has no {column!r} to be its label")
    return str(row[column])


def gradable_label(row: Mapping[str, Any], column: str = "label") -> str:
    """`label_of`, for answers to be compared with. Raises DitError: see there; or an empty answer would be right."""
    label = label_of(row, column)
    if not normalise(label):
        raise DitError(
            f"a diff's label is {short(label)}, which no answer could name: correct the index of the diffs"
        )
    return label


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without it Python looks for garbage again and again while 100,000 rows are made, for a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class DiffStore:
    """A complete store, opened for reading. `rows` are the index rows; diffs are read when asked for.

    A shard is compared with its digest when its first diff is read, so opening a large store is cheap.

    Raises:
        DitError: there is no store, it is unfinished, its index is damaged, or a shard is missing or truncated; when
            diffs are read, a shard is damaged.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        remedy = "run the stage 'diffs' that writes it"
        self.manifest = artifacts.read_manifest(
            self.path, FORMAT, check_digests=False, remedy=remedy, file_remedy=_REPAIR
        )
        if not fits(self.manifest, _TOLD):
            raise DitError(f"'{self.path / artifacts.MANIFEST}' is damaged: {remedy}")
        entry = self.manifest["files"].get("index.csv", {})
        artifacts.check_file(file_inside(self.path, "index.csv"), entry, _REPAIR)
        self._most: dict[str, int] = {}  # the largest number in each shard
        with _no_collections():
            self.rows: list[dict[str, Any]] = read_csv(self.path / "index.csv", PAPER_COLUMNS)
            for row in self.rows:
                self._parse(row)
        if not self.rows:
            raise DitError(f"'{self.path / 'index.csv'}' lists no weight diffs: {_REPAIR}")
        self._files: dict[str, SafetensorsFile] = {}

    def _parse(self, row: dict[str, Any]) -> None:
        """Puts the number and the lists of a row in the place of their texts."""
        row.update({key: from_cell(cell) for key, cell in row.items()})
        file, number = row["lora_path"], row["lora_idx"]
        listed = f"shards/{file}" in self.manifest["files"]
        if not listed or not (number.isascii() and number.isdigit() and len(number) < 10):
            raise DitError(
                f"{self.path / 'index.csv'} names number {short(number)} of {short(file)}, which is not "
                f"a shard of this store: {_REPAIR}"
            )
        row["lora_idx"] = int(number)
        self._most[file] = max(self._most.get(file, 0), int(number))
        for key in ("evidence", "keywords"):
            text = row.get(key) or "[]"
            try:
                row[key] = parse_json(text)
            except BadJson:
                row[key] = None
            if not isinstance(row[key], list) or set(map(type, row[key])) - {str}:
                raise DitError(
                    f"{self.path / 'index.csv'}: the column {key!r} is not a JSON list of texts: {short(text)}"
                )

    def __len__(self) -> int:
        return len(self.rows)

    def indices(self, **conditions: str) -> list[int]:
        """Indices of the rows whose columns have these values, e.g. `indices(split="test")`."""
        return [
            i
            for i, row in enumerate(self.rows)
            if all(row.get(k) == v for k, v in conditions.items())
        ]

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            file = file_inside(self.path / "shards", name)
            if not file.resolve().is_relative_to(self.path.resolve()):
                raise DitError(
                    f"'{file.parent}' is a link out of the store: put the real folder there"
                )
            artifacts.check_file(file, self.manifest["files"][f"shards/{name}"], _REPAIR)
            opened, most = SafetensorsFile(file), self._most[name]
            few = [leaf for leaf, shape in opened.shapes().items() if (*shape, 0)[0] <= most]
            if few:
                raise DitError(
                    f"'{file}' has no number {most} of {short(few[0])}, which index.csv lists: {_REPAIR}"
                )
            self._files[name] = opened
        return self._files[name]

    def check_fits(self, indices: Iterable[int], config: DecoderConfig) -> None:
        """Raises DitError unless the diffs have shapes of this model; those of one shard are alike."""
        for i in {self.rows[i]["lora_path"]: i for i in indices}.values():
            check_shapes(self.shapes(i), config, f"{self.path}, diff {i}")

    def shapes(self, index: int) -> Delta:
        """What `read` returns, as `jax.ShapeDtypeStruct`s. No values are read."""
        file = self._file(self.rows[index]["lora_path"])
        return unflatten(
            {
                name: jax.ShapeDtypeStruct(file.shape(name)[1:], file.dtype(name))
                for name in file.names
            }
        )

    def read(self, index: int) -> Delta:
        """One diff; leaves [L, …] as numpy arrays. Only its own bytes are read."""
        row = self.rows[index]
        file, number = self._file(row["lora_path"]), row["lora_idx"]
        return self._finite({name: file.read_row(name, number) for name in file.names}, file)

    def _finite(self, leaves: dict[str, np.ndarray], file: SafetensorsFile) -> Delta:
        """Leaves as a delta. Raises DitError: one holds NaN or infinity, and all answers would mean nothing."""
        for name, leaf in leaves.items():
            with np.errstate(over="ignore", invalid="ignore"):  # beyond fp32, or NaN
                ends = np.asarray([leaf.min(initial=0), leaf.max(initial=0)], np.float32)
            if not np.isfinite(ends).all():
                raise DitError(
                    f"'{file.path}': {short(name)} holds NaN or infinity: get another diff"
                )
        return unflatten(leaves)

    def stacked(self, indices: Iterable[int]) -> Delta:
        """Several diffs; leaves [n, L, …] in the given order. Shards are read whole.

        LoRAs of several layouts get zeros up to the largest rank and all modules.
        """
        indices = list(indices)
        shards: dict[str, Delta] = {}
        for name in dict.fromkeys(self.rows[i]["lora_path"] for i in indices):
            file = self._file(name)
            shards[name] = self._finite({leaf: file.read(leaf) for leaf in file.names}, file)
        picked = [
            jax.tree.map(
                lambda x, at=self.rows[i]["lora_idx"]: x[at], shards[self.rows[i]["lora_path"]]
            )
            for i in indices
        ]
        if len(set(map(layout, picked))) > 1 and all(map(is_lora, picked)):
            return stack_padded(picked)
        return jax.tree.map(lambda *xs: np.stack(xs), *picked)
