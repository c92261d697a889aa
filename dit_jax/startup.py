"""What every command line does before it computes."""

import os
import pathlib

import jax

from dit_jax import host_memory, xla_flags


def prepare() -> None:
    """XLA flags, the allocator, and a persistent compilation cache: the second run of a program starts at once.

    What the environment says of any of them stays.
    """
    xla_flags.set_defaults()
    host_memory.keep_freed()
    host_memory.trim_after_compiling()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(caches / "dit_jax" / "xla"))
