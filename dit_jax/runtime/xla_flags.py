"""XLA flags that make GPU programs faster; XLA reads them when a process compiles its first program."""

import importlib.util
import os

# XLA joins products that read the same activations (gate and up; W and a LoRA's first factor). To do so it copies their
# weights side by side in every step, which moves more bytes than the products do (docs/performance.md).
GPU_FLAGS = {"xla_gpu_dot_merger_threshold_mb": 0}


def set_defaults() -> None:
    """Adds the flags to XLA_FLAGS where jax can use a GPU, except those that are set there already."""
    if not has_cuda_plugin():
        return
    given = os.environ.get("XLA_FLAGS", "")
    added = [f"--{name}={value}" for name, value in GPU_FLAGS.items() if f"--{name}=" not in given]
    os.environ["XLA_FLAGS"] = " ".join([*added, given]).strip()


def has_cuda_plugin() -> bool:
    """Whether jax's CUDA plugin is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13))
