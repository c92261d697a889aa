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
_ARENA_MAX = -8
_LARGEST_KEPT, _KEPT_FREE = 1 << 30, 2**31 - 1  # in one heap for all threads
_LARGEST_KEPT_BY_A_THREAD, _KEPT_FREE_BY_A_THREAD = 64 << 20, 128 << 20  # its heap holds no more
_FEW_CORES = 4

_COMPILED = "/jax/core/compile/backend_compile_duration"
_LONG = 0.5  # seconds


def keep_freed() -> None:
    """Keeps the memory of freed arrays for later ones.

    A compiled program on a CPU allocates its temporaries in every call. By default glibc gives that memory back to the
    system and asks for it again, and the system clears every page, which takes a fifth to a third of an adapter step
    (docs/performance.md). Large temporaries fit only into a heap that all threads share; those above 1 GiB are given
    back, as the place of one is lost when something small is left in it. With many cores, threads would wait for each
    other, so each has its own heap and keeps arrays of up to 64 MiB. Settings in the environment (MALLOC_…_,
    GLIBC_TUNABLES) take precedence.
    """
    said = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = _glibc("mallopt")
    if mallopt and not said:
        largest, free = _LARGEST_KEPT_BY_A_THREAD, _KEPT_FREE_BY_A_THREAD
        if (os.cpu_count() or 1) <= _FEW_CORES:
            mallopt(ctypes.c_int(_ARENA_MAX), ctypes.c_int(1))
            largest, free = _LARGEST_KEPT, _KEPT_FREE
        mallopt(ctypes.c_int(_MMAP_THRESHOLD), ctypes.c_int(largest))
        mallopt(ctypes.c_int(_TRIM_THRESHOLD), ctypes.c_int(free))


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
