"""Detects by its content what kind of weight diff or adapter a path holds, and reads every kind."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dit_jax.deltas import adapter_file, finetuned, gguf_lora, mlx, peft, reference_pt, store
from dit_jax.deltas.raw_diff import RawDiff
from dit_jax.errors import DitError
from dit_jax.formats import budgets, torch_pickle
from dit_jax.formats.files import (
    file_below,
    file_inside,
    has_file,
    read_json_object,
    regular_file,
    short,
)
from dit_jax.formats.gguf_file import open_gguf
from dit_jax.formats.hub import find
from dit_jax.formats.recognise import is_trainer_state, what_checkpoint, what_folder
from dit_jax.formats.safetensors_file import SafetensorsFile
from dit_jax.formats.weight_files import open_weights, weight_file
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.runtime.os_errors import explain_os_errors

KINDS = {
    "diff_store": "a diff store",
    "adapter": "an exported DIT adapter",
    "peft": "a PEFT adapter folder",
    "mlx": "an adapter folder of mlx-lm",
    "model": "a model folder",
    "release": "a folder of .pt files with an index.csv",
    "pt_diffs": "a .pt file of weight diffs",
    "pt_adapter": "a .pt file of an adapter",
    "pt_state_dict": "a file of whole weights",
    "gguf": "a GGUF file",
    "folder": "a folder of several weight diffs",
}
_ADAPTERS = ("adapter", "peft", "mlx", "pt_adapter", "gguf")  # what may be the adapter that answers
# The files that mark a foreign folder, in this order: a PEFT folder may hold the base's config as well.
_MARKS = {peft.CONFIG: "peft", reference_pt.INDEX: "release", "config.json": "model"}
_MANIFESTS = {store.FORMAT: "diff_store", adapter_file.ADAPTER_FORMAT: "adapter"}

MAX_DEPTH = 4  # how deep folders of diffs are searched
_SUFFIXES = (".pt", ".pth", ".bin", ".gguf", ".safetensors")
# Files of a folder that is read as a whole.
_PART = re.compile(
    r"config\.json|adapter_config\.json|adapter_model\.(safetensors|bin)|adapters\.safetensors|index\.csv"
    r"|manifest\.json|(model|pytorch_model)(-\d{1,6}-of-\d{1,6})?\.(safetensors|bin)(\.index\.json)?",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a path holds, before a base model is there to read it with.

    Attributes:
        path: the path, of a hub id that of its snapshot.
        kind: one of `KINDS`.
        tree: the content of a `.pt` file, which may take seconds to parse.
    """

    path: Path
    kind: str
    tree: Any = None


def detect_format(path: str | Path) -> str:
    """The kind of artifact at `path`, one of `KINDS`; see `look`."""
    return look(path).kind


def look(path: str | Path | Found) -> Found:
    """What is at a path or hub id.

    Raises:
        DitError: nothing is there, the kind is unknown, or the file is damaged.
    """
    if isinstance(path, Found):
        return path
    path = find(path)
    marks = (*_MARKS, "manifest.json")
    if _PART.fullmatch(path.name) and any(has_file(path.parent, name) for name in marks):
        path = path.parent  # a file that means nothing without the others
    if path.is_dir():
        return Found(path, _detect_folder(path))
    if path.suffix.lower() == ".gguf":
        return Found(path, "gguf")
    if path.suffix.lower() == ".safetensors":
        return Found(path, "pt_state_dict")
    tree = torch_pickle.load(path)
    kind = reference_pt.pt_kind(tree)
    if kind is None:
        raise DitError(
            f"'{path}' is a torch file, but holds neither weight diffs nor weights: check the path"
        )
    return Found(path, f"pt_{kind}", tree)


def look_for_diffs(path: str | Path) -> Found:
    """`look` for a path that should hold weight diffs. What shows without a base model is checked now.

    Raises:
        DitError: see `look`; it is an adapter of this program, files are missing, or options are not supported.
    """
    found = look(path)
    if found.kind == "adapter":
        raise _no_diff(found)
    _check_files(found)
    return found


def look_for_adapter(path: str | Path) -> Found:
    """`look_for_diffs` for a path that should hold an adapter."""
    found = look(path)
    if found.kind not in _ADAPTERS:
        raise _no_adapter(found)
    _check_files(found)
    return found


def _check_files(found: Found) -> None:
    if found.kind == "peft":
        peft.open_peft(found.path)
    elif found.kind == "mlx":
        mlx.open_mlx(found.path)
    elif found.kind == "model":
        finetuned.read_own_config(found.path)
        open_weights(found.path)
    elif found.kind == "gguf":
        open_gguf(regular_file(found.path))
    elif found.kind == "pt_state_dict" and found.tree is None:  # safetensors
        SafetensorsFile(regular_file(found.path))


def _no_diff(found: Found) -> DitError:
    return DitError(
        f"'{found.path}' is {KINDS[found.kind]}, not a weight diff: give it as the adapter"
    )


def _no_adapter(found: Found) -> DitError:
    if found.kind == "folder":
        names = _some(name for name, _ in list_diffs(found.path))
        return DitError(
            f"'{found.path}' itself holds no adapter, but these in it may be one: {names}"
        )
    return DitError(
        f"'{found.path}' is {KINDS[found.kind]}, not an adapter: give it as the diff, and as the adapter a PEFT "
        "folder, dit-adapter.pt or an exported adapter"
    )


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
        if peft.has_weights(folder) or has_file(folder, mlx.WEIGHTS):
            raise DitError(
                f"'{folder}' holds two changes, the weights of a whole model ({whole}) and an adapter "
                f"({peft.CONFIG}): move one of them to a folder of its own"
            )
        return "model"  # the adapter was merged, and its config stayed
    if mlx.is_mlx(folder):
        return "mlx"
    for name, kind in _MARKS.items():
        if has_file(folder, name):
            return kind
    with explain_os_errors("read", folder):
        names = [entry.name for entry in folder.iterdir()]
    what = what_checkpoint(names)
    if not what and not any(map(_PART.fullmatch, names)) and list_diffs(folder):
        return "folder"
    if what := what or what_folder(names):
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


def list_diffs(folder: Path) -> list[tuple[str, Path]]:
    """(name relative to the folder, path) of the diffs below a folder that is none itself, in natural order.

    These are folders with files of a model, an adapter or a checkpoint, up to four deep, and files that may hold
    weights. None of them is opened, so reading one may fail. Hidden folders, states of trainers and adapters of this
    program are left out.

    Raises:
        DitError: a link leads out of the folder, it holds too many files, or all are checkpoints of one training.
    """
    root = folder.resolve()
    found: list[tuple[str, Path]] = []
    walked: set[Path] = set()  # links may lead in circles
    count = 0

    def walk(place: Path, depth: int) -> None:
        nonlocal count
        real = place.resolve()
        if real in walked:
            return
        walked.add(real)
        with explain_os_errors("read", place):
            entries = sorted(place.iterdir(), key=lambda path: _natural(path.name))
        count += len(entries)
        if count > budgets.MAX_FOLDER_ENTRIES:
            raise DitError(
                f"'{folder}' holds more than {budgets.MAX_FOLDER_ENTRIES} files: check the path"
            )
        for path in entries:
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise DitError(
                        f"'{path}' is a link out of its folder: give what it leads to by its own path"
                    )
                with explain_os_errors("read", path):
                    names = [entry.name for entry in path.iterdir()]
                if any(map(_PART.fullmatch, names)) or what_checkpoint(names):
                    if _own_kind(path) != "adapter":
                        found.append((path.relative_to(folder).as_posix(), path))
                elif depth < MAX_DEPTH:
                    walk(path, depth + 1)
            elif path.suffix.lower() in _SUFFIXES and not is_trainer_state(path.name):
                if path.is_symlink() and path.exists():
                    file_below(folder, path)
                found.append((path.relative_to(folder).as_posix(), path))

    with explain_os_errors("read", folder):
        walk(folder, 1)
    if len(found) > 1 and all(re.fullmatch(r"checkpoint-\d+", name) for name, _ in found):
        raise DitError(
            f"'{folder}' holds {len(found)} checkpoints of one training ({_some(name for name, _ in found)}): give "
            f"one of them, the last is '{found[-1][1]}'"
        )
    return found


def _own_kind(folder: Path) -> str | None:
    """The kind of a folder of this program by its manifest; None: it is another's, or damaged, which reading tells."""
    with contextlib.suppress(DitError):
        if has_file(folder, "manifest.json"):
            said = read_json_object(file_inside(folder, "manifest.json")).get("format")
            return _MANIFESTS.get(said) if isinstance(said, str) else None
    return None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts run2 before run10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part)
        for part in re.split(r"(\d{1,15})", name)
    ]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(short, names[:3])) + more


def open_diffs(
    path: str | Path | Found,
    config: DecoderConfig,
    base_params: Any = None,
    svd_rank: int | None = None,
    align: bool = False,
) -> Sequence[RawDiff]:
    """The weight diffs of a foreign format as a lazy sequence.

    Args:
        path: a PEFT folder, model folder, release folder with an index.csv, or `.pt` file.
        config: architecture of the base model.
        base_params: its parameters, which diffs that are whole weights need.
        svd_rank: reduces whole weights, and nothing else, to a LoRA of this rank, see `finetuned.read_finetuned`.
        align: of finetuned models, see there; factors need none, since their product counts.

    Raises:
        DitError: see `detect_format` and the readers. `dit_jax.deltas.store` reads diff stores.
    """
    found = look(path)
    path, kind = found.path, found.kind
    if kind == "pt_diffs":
        return reference_pt.PtDiffs(path, config, base_params, svd_rank, found.tree)
    if kind == "release":
        return reference_pt.read_release(path, config, base_params, svd_rank)
    if kind in ("model", "pt_state_dict"):
        return Lazy(lambda: finetuned.read_finetuned(path, config, base_params, svd_rank, align))
    if kind in _ADAPTERS and kind != "adapter":
        return Lazy(lambda: open_adapter(found, config, base_params))
    raise _no_diff(found)


def open_adapter(
    path: str | Path | Found, config: DecoderConfig, base_params: Any = None
) -> RawDiff:
    """The adapter in a foreign format: a folder of PEFT or mlx-lm, a GGUF LoRA, or a `.pt` file {module: (A, B)}.

    Folders that change whole weights need `base_params`.

    Raises:
        DitError: the path holds another format, or see the readers.
    """
    found = look(path)
    if found.kind == "peft":
        return peft.read_peft(found.path, config, base_params)
    if found.kind == "mlx":
        return mlx.read_mlx(found.path, config, base_params)
    if found.kind == "gguf":
        return gguf_lora.read_gguf_lora(found.path, config)
    if found.kind == "pt_adapter":
        return reference_pt.read_pt_adapter(found.path, config, found.tree)
    raise _no_adapter(found)
