"""The compiled programs that jax keeps on disk, each with a digest: a damaged one is compiled again.

Without it a flipped bit in an entry ends the process or computes something else, and a truncated one is never replaced.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax

from dit_jax.errors import first_line
from dit_jax.runtime.outgoing import show

_told: set[str] = set()
_SUFFIX = "-sha256"  # of our keys: other programs may share the folder, and would not understand our entries


def check_entries() -> None:
    """From now on jax believes no entry of its persistent compilation cache without its digest."""
    try:
        from jax._src import compilation_cache, config
        from jax._src.lru_cache import LRUCache
    except ImportError:  # of private names: rather no cache than one that is not checked
        jax.config.update("jax_enable_compilation_cache", False)
        return

    class Checked(LRUCache):
        """Entries are the digest of key and value, and the value."""

        def get(self, key: str) -> bytes | None:
            stored = None
            with _noted(self.path):
                stored = super().get(key + _SUFFIX)
            if stored is None:
                return None
            digest, value = stored[:32], stored[32:]
            if digest == _digest(key, value):
                return value
            with contextlib.suppress(OSError):  # `put` leaves what is there
                self._file(key).unlink()
            return None

        def put(self, key: str, value: bytes) -> None:
            with _noted(self.path):
                try:
                    super().put(key + _SUFFIX, _digest(key, value) + value)
                except OSError:
                    self._file(key).unlink(missing_ok=True)  # the disk may be full
                    raise

        def _file(self, key: str) -> Any:
            return self.path / f"{key}{_SUFFIX}-cache"

    def open_cache(path: str) -> tuple[Any, str] | None:
        with _noted(path):
            return Checked(path, max_size=config.compilation_cache_max_size.value), path
        return None

    if compilation_cache.get_file_cache.__name__ != open_cache.__name__:
        compilation_cache.get_file_cache = open_cache
        compilation_cache.reset_cache()  # something may have been compiled before
        # XLA's own cache of measured kernels has no digests either.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


@contextlib.contextmanager
def _noted(folder: Any) -> Iterator[None]:
    """A folder that cannot be used is one note; jax would warn of each program."""
    try:
        yield
    except Exception as error:  # remote folders have errors of their own
        if str(folder) not in _told:
            _told.add(str(folder))
            said = first_line(error)
            show(f"note: compiled programs are not all kept in '{folder}' ({said})", error=True)


def _digest(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + value).digest()
