"""The compiled programs that jax keeps on disk, each with a digest: a damaged one is compiled again.

Without it a flipped bit in an entry ends the process or computes something else, and a truncated one is never replaced.
"""

import contextlib
import hashlib
from typing import Any

import jax

_SUFFIX = "-sha256"  # of our keys: other programs may share the folder, and would not understand our entries


def check_entries() -> None:
    """From now on jax believes no entry of its persistent compilation cache without its digest."""
    try:
        from jax._src import compilation_cache, config
        from jax._src.lru_cache import LRUCache
    except (
        ImportError
    ):  # names of no public interface: rather no cache than one that is not checked
        jax.config.update("jax_enable_compilation_cache", False)
        return

    class Checked(LRUCache):
        """Entries are the digest of key and value, and the value."""

        def get(self, key: str) -> bytes | None:
            stored = super().get(key + _SUFFIX)
            if stored is None:
                return None
            digest, value = stored[:32], stored[32:]
            if digest == _digest(key, value):
                return value
            with contextlib.suppress(OSError):  # `put` leaves what is there
                (self.path / f"{key}{_SUFFIX}-cache").unlink()
            return None

        def put(self, key: str, value: bytes) -> None:
            super().put(key + _SUFFIX, _digest(key, value) + value)

    def open_cache(path: str) -> tuple[Any, str]:
        return Checked(path, max_size=config.compilation_cache_max_size.value), path

    if compilation_cache.get_file_cache.__name__ != open_cache.__name__:
        compilation_cache.get_file_cache = open_cache
        compilation_cache.reset_cache()  # something may have been compiled before
        # XLA's own cache of measured kernels has no digests either.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _digest(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + value).digest()
