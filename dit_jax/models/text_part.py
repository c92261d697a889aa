"""Which weights of a multimodal model belong to images."""

import re

# After PEFT's prefix; transformers 4.52 moved everything but the head under "model.".
_VISION = re.compile(r"(base_model\.model\.)?(model\.)?(vision_tower|multi_modal_projector)\.")


def is_vision(name: str) -> bool:
    """Whether a tensor or module belongs to the vision tower or its projector: text never meets them."""
    return _VISION.match(name) is not None
