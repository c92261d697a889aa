"""How the process's allocator treats freed memory; for command lines, at their start."""

import ctypes
import os
import sys

# glibc's mallopt numbers (malloc.h), and bytes.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 64 << 20  # what one heap of a thread can hold at most
_KEPT_FREE = 128 << 20


def keep_freed() -> None:
    """Keeps freed arrays of up to 64 MiB for the next ones; nothing where the C library is not glibc.

    A compiled program on a CPU allocates its temporaries in every call. By default glibc gives such memory back to the
    system and asks for it again, and the system clears every page: a third of the time of a small adapter step
    (docs/performance.md). What the environment says (MALLOC_…_, GLIBC_TUNABLES) stays.
    """
    said = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if said or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(_MMAP_THRESHOLD), ctypes.c_int(_LARGEST_KEPT))
        mallopt(ctypes.c_int(_TRIM_THRESHOLD), ctypes.c_int(_KEPT_FREE))
