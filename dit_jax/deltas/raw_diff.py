"""A weight diff as read from a foreign file, and the checks of its tensors."""

import dataclasses
from typing import Any

import numpy as np

from dit_jax.errors import DitError
from dit_jax.formats.files import short
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.delta_trees import FLOATS
from dit_jax.models.modules import Path, all_modules

COMPUTED = ("svd", "aligned", "notes", "found_in")  # keys of metadata that no file may fill


@dataclasses.dataclass
class RawDiff:
    """A weight diff as read from a foreign file, in numpy.

    Attributes:
        delta: the tree of docs/architecture.md, factors in the dtype of the file, scales in float32.
        label: what the diff was trained on, if the file says so.
        trigger: its trigger, if the file says so.
        metadata: everything else that the file says about it (JSON values).
        kind: 'diff' or 'adapter'.
    """

    delta: dict[str, Any]
    label: str | None = None
    trigger: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "diff"


def said(row: dict[str, Any]) -> dict[str, Any]:
    """What a file says about a diff, without the names under which this program tells what it computed."""
    return {name: value for name, value in row.items() if name not in COMPUTED}


def projection_size(
    path: Path, name: str, config: DecoderConfig, source: object
) -> tuple[int, int]:
    """(in, out) of a projection. Raises DitError for modules that cannot hold a LoRA."""
    module = all_modules(config)[path]
    if not module.lora:
        raise DitError(
            f"'{source}' has LoRA factors for {short(name)}: only the seven projections of a layer "
            "(q, k, v, o, gate, up, down) can have them"
        )
    inputs, outputs = module.shape
    return inputs, outputs


def check_values(array: np.ndarray, name: str, source: object) -> np.ndarray:
    """Returns the array. Raises DitError if it does not hold floats, or holds NaN or infinity."""
    if array.dtype.name not in FLOATS:
        raise DitError(
            f"'{source}': {short(name)} holds {array.dtype.name} values instead of floats"
        )
    with np.errstate(over="ignore"):
        # Values beyond fp32 would become infinity later.
        narrow = array.astype(np.float32) if array.dtype == np.float64 else array
    if not np.isfinite(narrow).all():
        raise DitError(
            f"'{source}': {short(name)} holds NaN or infinity: the diff is broken, get another"
        )
    return array
