"""The text part of a multimodal model's weights: their names as in a text model, and what belongs to images."""

import re
from typing import Any

import numpy as np

# After PEFT's prefix; transformers 4.52 moved everything but the head under "model.".
_VISION = re.compile(r"(base_model\.model\.)?(model\.)?(vision_tower|multi_modal_projector)\.")
_TEXT = re.compile(r"^(model\.language_model\.|language_model\.model\.)")


def is_vision(name: str) -> bool:
    """Whether a tensor or module belongs to the vision tower or its projector: text never meets them."""
    return _VISION.match(name) is not None


def text_name(name: str) -> str:
    """A tensor's name in a model of text alone."""
    return _TEXT.sub("model.", name).removeprefix("language_model.")


class TextPart:
    """A folder's weights as those of a text model: `shapes()`, `dtypes()` and `read(name)`."""

    def __init__(self, files: Any):
        self._files = files
        self._own = {text_name(name): name for name in files.shapes() if not is_vision(name)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._files.shapes()
        return {name: shapes[own] for name, own in self._own.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        dtypes = self._files.dtypes()
        return {name: dtypes[own] for name, own in self._own.items()}

    def read(self, name: str) -> np.ndarray:
        found: np.ndarray = self._files.read(self._own[name])
        return found
