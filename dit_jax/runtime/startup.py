"""What every command line does before it computes."""

import contextlib
import os
import pathlib

import jax

from dit_jax.runtime import host_memory, program_cache, xla_flags


def prepare() -> None:
    """Sets XLA flags, the allocator and a persistent compilation cache, so that a second run starts at once.

    Settings in the environment take precedence.
    """
    xla_flags.set_defaults()
    host_memory.keep_freed()
    host_memory.trim_after_compiling()
    program_cache.check_entries()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
        # An empty or relative one counts as none, as its specification says.
        _keep_programs(caches if os.path.isabs(caches) else "~/.cache")


def _keep_programs(caches: str) -> None:
    """Keeps compiled programs on disk if their folder can be written; otherwise jax would warn about each of them."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = pathlib.Path(caches).expanduser() / "dit_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
