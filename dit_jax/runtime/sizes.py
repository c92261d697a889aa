"""Sizes rounded up: few sizes of arrays are few compiled programs."""


def next_multiple(size: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `size`."""
    return -(-size // step) * step


def next_power(size: int) -> int:
    """The smallest power of two that is not below `size`, which is 1 or more."""
    return 1 << (size - 1).bit_length()
