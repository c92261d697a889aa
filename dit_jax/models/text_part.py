"""The text part of a multimodal model's weights: their names as in a text model, and what belongs to images."""

import re

# After PEFT's prefix; transformers 4.52 moved everything but the head under "model.".
_VISION = re.compile(r"(base_model\.model\.)?(model\.)?(vision_tower|multi_modal_projector)\.")
_TEXT = re.compile(r"^(model\.language_model\.|language_model\.model\.)")


def is_vision(name: str) -> bool:
    """Whether a tensor or module belongs to the vision tower or its projector: text never meets them."""
    return _VISION.match(name) is not None


def text_name(name: str) -> str:
    """A tensor's name in a model of text alone."""
    return _TEXT.sub("model.", name).removeprefix("language_model.")
