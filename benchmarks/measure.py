"""Measures one process: seconds, processor seconds, peak memory, and the machine's ceilings."""

import contextlib
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any


def reset_peak_memory() -> None:
    """Resets the process's peak resident memory to what it holds now (Linux; elsewhere does nothing)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Peak resident bytes since `reset_peak_memory`, or of the process's life if that is unknown."""
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def repeat(run: Callable[[], Any], repeats: int) -> tuple[Any, dict[str, Any]]:
    """Runs `repeats` times: the last result, and {"seconds" (median), "all_seconds", "cpu_seconds" (median)}."""
    result, wall, cpu = None, [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        result = run()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return result, {
        "seconds": statistics.median(wall),
        "all_seconds": [round(x, 6) for x in wall],
        "cpu_seconds": statistics.median(cpu),
    }


def best_rate(run: Callable[[], Any], work: float, repeats: int = 3) -> float:
    """The best of several rates (work per second): a ceiling is what the machine can do, not what it did on average."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return work / min(times)


def jax_ceilings(dtype: str, platform: str) -> dict[str, float]:
    """FLOP/s of a square matrix product, and bytes/s of reading and writing a large array, through jax."""
    import jax
    import jax.numpy as jnp

    from dit_jax.models.products import product

    size, count = (1536, 2**25) if platform == "cpu" else (8192, 2**29)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in (0, 1))
    x = jnp.zeros((count,), jnp.float32)
    # The product of the models: jax's own is slow for bfloat16 on a CPU.
    multiply = jax.jit(lambda a, b: product("ij,jk->ik", a, b))
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # new memory would have to be cleared

    def read_and_write() -> None:
        nonlocal x
        x = add(x).block_until_ready()

    return {
        "flops_per_second": best_rate(lambda: multiply(a, b).block_until_ready(), 2 * size**3),
        "bytes_per_second": best_rate(read_and_write, 8 * count),
    }


def torch_ceilings(dtype: str, platform: str) -> dict[str, float]:
    """The same through PyTorch."""
    import torch

    device, size, count = ("cpu", 1536, 2**25) if platform == "cpu" else ("cuda", 8192, 2**29)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in "ab")
    x = torch.zeros(count, device=device)
    y = torch.empty_like(x)

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def product() -> None:
        a @ b
        finish()

    def add() -> None:
        torch.add(x, 1, out=y)
        finish()

    with torch.inference_mode():
        return {
            "flops_per_second": best_rate(product, 2 * size**3),
            "bytes_per_second": best_rate(add, 8 * count),
        }
