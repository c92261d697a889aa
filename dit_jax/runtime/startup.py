"""What every command line does before it computes."""

import contextlib
import os
import pathlib

import jax

from dit_jax.runtime import host_memory, xla_flags


def prepare() -> None:
    """XLA flags, the allocator, and a persistent compilation cache: the second run of a program starts at once.

    What the environment says of any of them stays.
    """
    xla_flags.set_defaults()
    host_memory.keep_freed()
    host_memory.trim_after_compiling()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        _keep_programs(os.environ.get("XDG_CACHE_HOME", "~/.cache"))


def _keep_programs(caches: str) -> None:
    """Where the folder cannot be written, or nobody has a home, programs are compiled anew; jax would warn of each."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = pathlib.Path(caches).expanduser() / "dit_jax" / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
