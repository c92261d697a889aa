"""NVIDIA GPUs that are not present: what XLA's compiler needs to know about them."""

from typing import Any

import jax

from dit_jax.errors import DitError, first_line
from dit_jax.runtime.xla_flags import GPU_FLAGS, has_cuda_plugin

GIB = 2**30
# name -> (device name, compute capability, memory in bytes, its bytes per second, multiprocessors, L2 cache, GHz)
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", "8.0", 79.1 * GIB, 2.039e12, 108, 40 * 2**20, 1.41),
    "h100": ("NVIDIA H100 80GB HBM3", "9.0", 79.1 * GIB, 3.352e12, 132, 50 * 2**20, 1.98),
    "h200": ("NVIDIA H200", "9.0", 139.8 * GIB, 4.8e12, 132, 50 * 2**20, 1.98),
}
# Bytes per block with opt-in and per multiprocessor, by major compute capability.
_SHARED_MEMORY = {"8": (166912, 167936), "9": (232448, 233472)}
# Without a device the compiler cannot try out kernels. Of its own kernels it would take the first candidate, which it
# cannot build for some shapes, so products are left to cuBLAS.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False, **GPU_FLAGS}


def gpu_devices(name: str, count: int) -> list[Any]:
    """`count` devices of one host, to compile for.

    Raises:
        DitError: jax's CUDA plugin, which holds the compiler, is not installed or fails.
    """
    if not has_cuda_plugin():
        raise DitError(
            "planning for a GPU needs its compiler, which is not installed: "
            "pip install 'dit_jax[plan-gpu]' (or pip install -e '.[plan-gpu]' in a checkout)"
        )
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"1x1x{count}",
            topology=f"1x1x{count}",
            target_config=_target(name),
        )
    except Exception as error:  # the plugin raises many kinds, all with a message
        raise DitError(
            f"jax's CUDA plugin cannot compile for {name}: {first_line(error)}"
        ) from error
    return list(found.devices)


def _target(name: str) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    device, capability, memory, bandwidth, cores, l2_cache, clock = GPUS[name]
    major, minor = capability.split(".")
    per_block, per_core = _SHARED_MEMORY[major]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores}
  fpus_per_core: {128 if major == "9" else 64}
  clock_rate_ghz: {clock}
  device_memory_size: {int(memory)}
  memory_bandwidth: {int(bandwidth)}
  l2_cache_size: {l2_cache}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {per_block}
  shared_memory_per_core: {per_core}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{device}"
"""
