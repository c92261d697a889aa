"""What glibc's allocator does with freed memory; elsewhere these functions do nothing."""

import ctypes
import functools
import os
import sys
from typing import Any

import jax

# mallopt's parameters (malloc.h), and their values in bytes.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 64 << 20  # the most that the heap of a thread can hold
_KEPT_FREE = 128 << 20

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 0.5  # seconds


def keep_freed() -> None:
    """Keeps the memory of freed arrays of up to 64 MiB for later ones.

    A compiled program on a CPU allocates its temporaries in every call. By default glibc gives that memory back to the
    system and asks for it again, and the system clears every page, which takes a third of a small adapter step
    (docs/performance.md). Settings in the environment (MALLOC_…_, GLIBC_TUNABLES) take precedence.
    """
    said = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = _glibc("mallopt")
    if mallopt and not said:
        mallopt(ctypes.c_int(_MMAP_THRESHOLD), ctypes.c_int(_LARGEST_KEPT))
        mallopt(ctypes.c_int(_TRIM_THRESHOLD), ctypes.c_int(_KEPT_FREE))


@functools.cache
def trim_after_compiling() -> None:
    """Returns the memory that a long compilation leaves behind: on a CPU 0.3 GiB in the heaps of idle threads."""
    trim = _glibc("malloc_trim")
    if trim is None:
        return

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED and duration_secs > _LONG:
            trim(ctypes.c_size_t(0))

    jax.monitoring.register_event_duration_secs_listener(listen)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
