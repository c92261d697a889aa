"""How much work a step is, how fast it went (tokens, model FLOPs, MFU), and profiles of steps.

MFU (model FLOPs utilization) is model FLOPs per second ÷ (devices × FLOPs per second of one device in a large matmul
of the model's dtype, measured in this process). With P the kernels of the layers, V·D the head, L layers of N heads of
size H, and a frozen base, a training step has

    4 · (P · tokens + V·D · scored tokens) + 12 · L · N · H · Σ length²

model FLOPs. A frozen weight has one product forward and one backward (for the activations); attention multiplies
activations alone, so its backward pass has twice the products of its forward pass. Attention counts whole, also what
the causal mask or a window hides. Padding, recomputation, the factors of LoRA and the teacher of the KL terms are
overhead, not model FLOPs.
"""

import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.data.batch import TokenBatch
from dit_jax.errors import DitError
from dit_jax.models.decoder_config import DecoderConfig
from dit_jax.models.modules import count_parameters
from dit_jax.runtime import artifacts, processes, stage_records

MFU = (
    "MFU = model FLOPs/s ÷ (devices × measured matmul FLOPs/s of one); model FLOPs = "
    "4 (P tokens + V D scored) + 12 L N H Σ length², base frozen"
)


class Work(NamedTuple):
    """The size of a batch, or of several: works can be added."""

    tokens: float = 0.0
    scored: float = 0.0
    squares: float = 0.0  # Σ length²
    diffs: float = 0.0
    steps: float = 0.0

    def plus(self, other: "Work") -> "Work":
        """The sum, field by field."""
        return Work._make(a + b for a, b in zip(self, other, strict=True))


def count_work(batch: TokenBatch, *, share: float = 1.0, diffs: int = 0, steps: int = 1) -> Work:
    """The work of a batch of host arrays with any leading axes; padding does not count.

    Args:
        share: which part of the whole batch these rows are (a process holds only its own rows).
        diffs: how many diffs are finished with this batch.
        steps: how many optimizer steps it holds.
    """
    lengths = np.asarray(batch.lengths, np.float64)
    scored = np.count_nonzero(np.asarray(batch.weight))
    sums = (lengths.sum() / share, scored / share, np.square(lengths).sum() / share)
    return Work(float(sums[0]), float(sums[1]), float(sums[2]), diffs, steps)


def _products(config: DecoderConfig, work: Work) -> tuple[float, float]:
    """(multiply-adds with weights, L · N · H · Σ length²) of one forward pass."""
    c = config
    layers, head = count_parameters(c, lora_only=True), c.hidden_size * c.vocab_size
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim
    return layers * work.tokens + head * work.scored, attention * work.squares


def forward_flops(config: DecoderConfig, work: Work) -> float:
    """FLOPs of the base's forward pass over this work: projections and head, scores and weighted values."""
    weights, attention = _products(config, work)
    return 2.0 * weights + 4.0 * attention


def train_flops(config: DecoderConfig, work: Work) -> float:
    """Model FLOPs of training on this work with a frozen base (formula above)."""
    weights, attention = _products(config, work)
    return 4.0 * weights + 12.0 * attention


@functools.lru_cache
def matmul_flops(dtype: str) -> float:
    """FLOPs per second of one device in square matmuls of this dtype, the best of three runs.

    float32 products have full precision, as in the model.
    """
    device = jax.local_devices()[0]
    n, repeats = (1024, 1) if device.platform == "cpu" else (4096, 32)

    @jax.jit
    def chain(x: jax.Array, y: jax.Array) -> jax.Array:
        body = lambda _, z: jnp.dot(z, y, precision="highest")  # noqa: E731
        return jax.lax.fori_loop(0, repeats, body, x)

    # This matrix is its own square, so the numbers neither grow nor vanish.
    x = jax.device_put(jnp.full((n, n), 1 / n, dtype), device)
    chain(x, x).block_until_ready()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        chain(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return repeats * 2.0 * n**3 / best


def count_devices(mesh: Any) -> int:
    """Devices that a mesh computes on; the CPU devices of one host share its cores and count as one."""
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return len({device.process_index for device in devices})
    return len(devices)


def device_memory() -> dict[str, float]:
    """Bytes in use and their peak on this process's first device; on a CPU the peak of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return {"process_peak_bytes": float(stage_records.peak_memory_bytes())}
    names = {"bytes_in_use": "device_bytes", "peak_bytes_in_use": "device_peak_bytes"}
    return {names[key]: float(stats[key]) for key in names if key in stats}


class Meter:
    """Speed between two calls of `lap`: `add` the work of every step, and call `lap` when its results are there.

    The first lap of a process includes the compilation and is marked with `compiled`: 1.
    """

    def __init__(self, config: DecoderConfig, mesh: Any = None):
        self._config, self._devices = config, count_devices(mesh)
        self._work, self._laps = Work(), 0
        self._start = time.perf_counter()

    def add(self, work: Work) -> None:
        """Counts the work of one step."""
        self._work = self._work.plus(work)

    def lap(self) -> dict[str, float]:
        """Rates since the last lap: step_seconds, tokens_per_second, mfu, diffs_per_hour (if any), memory."""
        now = time.perf_counter()
        seconds, work = max(now - self._start, 1e-9), self._work
        ceiling = self._devices * matmul_flops(self._config.dtype)
        rates = {
            "step_seconds": seconds / max(work.steps, 1),
            "tokens_per_second": work.tokens / seconds,
            "mfu": train_flops(self._config, work) / seconds / ceiling,
            **({"diffs_per_hour": 3600 * work.diffs / seconds} if work.diffs else {}),
            **device_memory(),
            **({} if self._laps else {"compiled": 1.0}),
        }
        self._laps += 1
        # The clock starts again here, so that measuring the ceiling counts in no lap.
        self._work, self._start = Work(), time.perf_counter()
        return rates


class Profile:
    """A trace of the steps [first, last) into a folder, for TensorBoard or Perfetto; (0, 0) is off.

        with Profile(folder, (10, 13)) as profile:
            for step in range(steps):
                profile.step(step, state)
                state = train_step(state)

    Each process traces its own devices. At the end of the range it waits for the results of the last step, so that
    the trace is complete; a profile costs no other wait.

    Raises:
        DitError: `steps` is not two numbers.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: Sequence[int] = (0, 0)):
        if len(steps) != 2:
            raise DitError(
                f"a profile takes two step numbers, not {tuple(steps)}: write profile=10,13"
            )
        self._folder, (self._first, self._last) = Path(folder), steps
        self._tracing = False

    def step(self, index: int, results: Any = None) -> None:
        """Call it before step `index`; `results` are those of the previous step."""
        if self._tracing and index >= self._last:
            jax.block_until_ready(results)
            self._stop()
        elif not self._tracing and self._first <= index < self._last:
            jax.profiler.start_trace(str(artifacts.make_dir(self._folder)))
            self._tracing = True

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()
        processes.say(f"profile: {self._folder}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracing:  # the range goes on to the end of the stage
            self._stop()
