"""What kind of weight diff or adapter a path holds, by its content; one reader for all of them."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_jax.deltas import finetuned, gguf_lora, peft, reference_pt
from dit_jax.deltas.raw_diff import RawDiff, svd_error
from dit_jax.errors import DitError
from dit_jax.formats import torch_pickle
from dit_jax.formats.files import file_inside, has_file, read_json_object, short
from dit_jax.models.decoder_config import DecoderConfig

KINDS = {
    "diff_store": "a diff store",
    "adapter": "an exported DIT adapter",
    "peft": "a PEFT adapter folder",
    "model": "a model folder",
    "release": "a folder of .pt files with an index.csv",
    "pt_diffs": "a .pt file of weight diffs",
    "pt_adapter": "a .pt file of an adapter",
    "pt_state_dict": "a .pt file of whole weights",
    "gguf": "a GGUF file",
}
# Of a folder of somebody else, in this order: a PEFT folder may hold the base's config as well.
_MARKS = {peft.CONFIG: "peft", reference_pt.INDEX: "release", "config.json": "model"}
_MANIFESTS = {
    "dit_jax.diff_store": "diff_store",
    "dit_jax.adapter": "adapter",
}


def detect_format(path: str | Path) -> str:
    """The kind of artifact at `path`, one of `KINDS`.

    Raises:
      DitError: nothing there, nothing known, or a damaged file.
    """
    return _inspect(Path(path))[0]


def _inspect(path: Path) -> tuple[str, Any]:
    """The kind of artifact at `path`, and what a `.pt` file holds: parsing a large one takes seconds."""
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a path that cannot be: too long, a NUL in it
        raise DitError(f"'{path}' is not a usable path: check it") from None
    if is_folder:
        return _detect_folder(path), None
    if not exists:
        raise DitError(f"'{path}' does not exist: check the path")
    if path.suffix.lower() == ".gguf":
        return "gguf", None
    tree = torch_pickle.load(path)
    kind = reference_pt.pt_kind(tree)
    if kind is None:
        raise DitError(f"'{path}' is a torch file, but holds neither weight diffs nor weights")
    return f"pt_{kind}", tree


def _detect_folder(folder: Path) -> str:
    if has_file(folder, "config.json") and has_file(folder / "diffs", "manifest.json"):
        raise DitError(
            f"'{folder}' is a run: give '{folder / 'diffs'}' as diffs, or '{folder / 'adapter'}' as adapter"
        )
    if has_file(folder, "manifest.json"):
        found = read_json_object(file_inside(folder, "manifest.json")).get("format")
        if isinstance(found, str) and found in _MANIFESTS:
            return _MANIFESTS[found]
        raise DitError(
            f"'{folder / 'manifest.json'}' describes {short(found)}, which is no weight diff"
        )
    for name, kind in _MARKS.items():
        if has_file(folder, name):
            return kind
    # A trainer leaves checkpoints in a folder, PEFT adapters of other names than "default".
    with contextlib.suppress(OSError):
        inside = sorted(x.name for x in folder.iterdir() if any(has_file(x, y) for y in _MARKS))
        if inside:
            more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
            raise DitError(
                f"'{folder}' itself holds no weight diff, but these in it may: "
                f"{', '.join(map(short, inside[:3]))}{more}"
            )
    raise DitError(
        f"'{folder}' holds neither a weight diff nor an adapter: expected manifest.json, {peft.CONFIG}, "
        f"{reference_pt.INDEX} or config.json (a .pt file is given by its own path)"
    )


class Lazy(Sequence[RawDiff]):
    """One diff that is read when it is asked for."""

    def __init__(self, read: Callable[[], RawDiff]):
        self._read = read

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._read() for _ in range(*index.indices(1))]
        if index not in (0, -1):
            raise IndexError(f"diff {index} of 1")
        return self._read()


def open_diffs(
    path: str | Path, config: DecoderConfig, base_params: Any = None, svd_rank: int | None = None
) -> Sequence[RawDiff]:
    """The weight diffs of a foreign format as a lazy sequence.

    Args:
      path: PEFT folder, model folder, release folder with an index.csv, or `.pt` file.
      config: architecture of the base model.
      base_params: its parameters, needed for diffs that are whole weights.
      svd_rank: reduce whole weights to a LoRA of this rank, see `finetuned.read_finetuned`.

    Raises:
      DitError: see `detect_format` and the readers; a diff store is read by `dit_jax.deltas.store`.
    """
    path = Path(path)
    kind, tree = _inspect(path)
    if svd_rank is not None and kind in ("peft", "pt_adapter", "gguf"):
        raise svd_error(path)
    if kind == "pt_diffs":
        return reference_pt.PtDiffs(path, config, base_params, svd_rank, tree)
    if kind == "release":
        return reference_pt.read_release(path, config, base_params, svd_rank)
    if kind == "peft":
        return Lazy(lambda: peft.read_peft(path, config, base_params))
    if kind in ("model", "pt_state_dict"):
        return Lazy(lambda: finetuned.read_finetuned(path, config, base_params, svd_rank))
    if kind == "gguf":
        return Lazy(lambda: gguf_lora.read_gguf_lora(path, config))
    if kind == "pt_adapter":
        return Lazy(lambda: reference_pt.read_pt_adapter(path, config))
    raise DitError(f"'{path}' is {KINDS[kind]}, not a weight diff: give it as the adapter")


def open_adapter(path: str | Path, config: DecoderConfig, base_params: Any = None) -> RawDiff:
    """The adapter in a foreign format: a PEFT folder, or a `.pt` file {module: (A, B)}.

    `base_params` is needed for PEFT folders that change whole weights.

    Raises:
      DitError: another format, or what the readers raise.
    """
    path = Path(path)
    kind = detect_format(path)
    if kind == "peft":
        return peft.read_peft(path, config, base_params)
    if kind == "gguf":
        return gguf_lora.read_gguf_lora(path, config)
    if kind == "pt_adapter":
        return reference_pt.read_pt_adapter(path, config)
    raise DitError(
        f"'{path}' is {KINDS[kind]}, not an adapter: give a PEFT folder, dit-adapter.pt or an "
        "export"
    )
