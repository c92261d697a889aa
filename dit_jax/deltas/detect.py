"""Detects by its content what kind of weight diff or adapter a path holds, and reads every kind."""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_jax.deltas import finetuned, gguf_lora, peft, reference_pt
from dit_jax.deltas.raw_diff import RawDiff, svd_error
from dit_jax.errors import DitError
from dit_jax.formats import torch_pickle
from dit_jax.formats.files import file_inside, has_file, read_json_object, short
from dit_jax.formats.recognise import what_folder
from dit_jax.formats.weight_files import weight_file
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
# The files that mark a foreign folder, in this order: a PEFT folder may hold the base's config as well.
_MARKS = {peft.CONFIG: "peft", reference_pt.INDEX: "release", "config.json": "model"}
_MANIFESTS = {
    "dit_jax.diff_store": "diff_store",
    "dit_jax.adapter": "adapter",
}


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def detect_format(path: str | Path) -> str:
    """The kind of artifact at `path`, one of `KINDS`.

    Raises:
      DitError: nothing is there, the kind is unknown, or the file is damaged.
    """
    return _inspect(Path(path))[0]


def _inspect(path: Path) -> tuple[str, Any]:
    """The kind of artifact at `path`, and the content of a `.pt` file, which may take seconds to parse."""
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # the path is too long, or holds a NUL
        raise DitError(f"'{path}' is not a usable path: check it") from None
    if is_folder:
        return _detect_folder(path), None
    if not exists:
        if _HUB_ID.fullmatch(str(path)):
            raise DitError(
                f"'{path}' does not exist here. If it is an id of the Hugging Face hub, download it first: hf download "
                f"{path} --local-dir DIR, and give DIR"
            )
        raise DitError(f"'{path}' does not exist: check the path")
    if path.suffix.lower() == ".gguf":
        return "gguf", None
    tree = torch_pickle.load(path)
    kind = reference_pt.pt_kind(tree)
    if kind is None:
        raise DitError(
            f"'{path}' is a torch file, but holds neither weight diffs nor weights: check the path"
        )
    return f"pt_{kind}", tree


def _detect_folder(folder: Path) -> str:
    if has_file(folder, "config.json") and has_file(folder / "diffs", "manifest.json"):
        raise DitError(
            f"'{folder}' is a run: give '{folder / 'diffs'}' as the diffs, or '{folder / 'adapter'}' as the adapter"
        )
    if has_file(folder, "manifest.json"):
        found = read_json_object(file_inside(folder, "manifest.json")).get("format")
        if isinstance(found, str) and found in _MANIFESTS:
            return _MANIFESTS[found]
        raise DitError(
            f"'{folder / 'manifest.json'}' describes {short(found)}, which is neither a weight diff nor an "
            "adapter: check the path"
        )
    if has_file(folder, peft.CONFIG) and (whole := _whole_weights(folder)):
        if any(has_file(folder, name) for name in (peft.WEIGHTS, peft.TORCH_WEIGHTS)):
            raise DitError(
                f"'{folder}' holds two changes, the weights of a whole model ({whole}) and an adapter "
                f"({peft.CONFIG}): move one of them to a folder of its own"
            )
        return "model"  # the adapter was merged, and its config stayed
    for name, kind in _MARKS.items():
        if has_file(folder, name):
            return kind
    # Trainers leave checkpoints in a folder, and PEFT leaves adapters whose name is not "default".
    with contextlib.suppress(OSError):
        inside = sorted(x.name for x in folder.iterdir() if any(has_file(x, y) for y in _MARKS))
        if inside:
            more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
            raise DitError(
                f"'{folder}' itself holds no weight diff, but these folders in it may: "
                f"{', '.join(map(short, inside[:3]))}{more}"
            )
    with contextlib.suppress(OSError):
        if what := what_folder(entry.name for entry in folder.iterdir()):
            raise DitError(f"'{folder}' {what}")
    raise DitError(
        f"'{folder}' holds neither a weight diff nor an adapter: expected manifest.json, {peft.CONFIG}, "
        f"{reference_pt.INDEX} or config.json (give a .pt file by its own path)"
    )


def _whole_weights(folder: Path) -> str | None:
    """The file with the weights of a whole model in a folder that has its config.json; None: there is none."""
    if not has_file(folder, "config.json"):
        return None
    with contextlib.suppress(OSError):
        return weight_file([entry.name for entry in folder.iterdir()])
    return None


class Lazy(Sequence[RawDiff]):
    """A sequence of one diff, which is read on access."""

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
      path: a PEFT folder, model folder, release folder with an index.csv, or `.pt` file.
      config: architecture of the base model.
      base_params: its parameters, which diffs that are whole weights need.
      svd_rank: reduces whole weights to a LoRA of this rank, see `finetuned.read_finetuned`.

    Raises:
      DitError: see `detect_format` and the readers. `dit_jax.deltas.store` reads diff stores.
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

    PEFT folders that change whole weights need `base_params`.

    Raises:
      DitError: the path holds another format, or see the readers.
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
        "exported adapter"
    )
