"""What JSON values of untrusted files must look like: `fits` compares one with a shape."""

import math
from collections.abc import Callable
from typing import Any

# A dict has these keys (and may have others), a list has items of one kind, a tuple stands for a list of as many items;
# anything else is a condition.
Shape = dict[str, Any] | list[Any] | tuple[Any, ...] | Callable[[Any], bool]


def fits(value: Any, shape: Shape) -> bool:
    """Whether a value has a shape."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(
            key in value and fits(value[key], one) for key, one in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(one, shape[0]) for one in value)
    if isinstance(shape, tuple):
        return isinstance(value, list) and len(value) == len(shape) and all(map(fits, value, shape))
    return bool(shape(value))


def maybe(shape: Shape) -> Shape:
    """null, or this shape."""
    return lambda value: value is None or fits(value, shape)


def each(shape: Shape) -> Shape:
    """A dict whose values have this shape, whatever its keys."""
    return lambda value: isinstance(value, dict) and all(fits(one, shape) for one in value.values())


def optional(**shapes: Shape) -> Shape:
    """A dict in which these keys may be missing."""
    return lambda value: (
        isinstance(value, dict)
        and all(fits(value[key], shape) for key, shape in shapes.items() if key in value)
    )


def is_number(value: Any) -> bool:
    """A finite number, no larger than a float."""
    if type(value) is int:
        return value.bit_length() <= 1000
    return type(value) is float and math.isfinite(value)


def is_any_number(value: Any) -> bool:
    """A number, which may be infinite or NaN."""
    return type(value) in (int, float)


def is_count(value: Any) -> bool:
    """An integer from 0 to 2**32 - 1."""
    return type(value) is int and 0 <= value < 2**32


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)
