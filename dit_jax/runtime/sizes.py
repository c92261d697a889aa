"""Sizes rounded up, since few sizes of arrays are few compiled programs; and a few of many things."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def next_multiple(size: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `size`."""
    return -(-size // step) * step


def next_power(size: int) -> int:
    """The smallest power of two that is not below `size`, which is 1 or more."""
    return 1 << (size - 1).bit_length()


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]
