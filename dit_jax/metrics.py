"""What a run reports while it works: WORKDIR/metrics/<stage>.jsonl, the same for TensorBoard, and profiles.

    tensorboard --logdir WORKDIR/metrics

Nothing here waits for a device: the caller hands over numbers that it has fetched anyway. Process 0 writes.

MFU (model FLOPs utilization) is model FLOPs per second ÷ (devices × the FLOPs per second that one device
reaches in one large matmul of the model's dtype, measured in this process). Model FLOPs of a training step,
with P the kernels of the layers, V·D the head, and the base model frozen (so its backward pass has products
for the activations only, none for the weights; attention, whose factors are all activations, has both):

    4 · (P · tokens + V·D · scored tokens) + 12 · L · N · H · Σ length²

Attention counts whole, also what the causal mask hides. Padding, recomputation, the factors of LoRA and the teacher
of the KL terms count as overhead, not as model FLOPs.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax import artifacts, processes
from dit_jax.data.batch import TokenBatch
from dit_jax.errors import DitError
from dit_jax.event_file import EventFile
from dit_jax.models.config import Qwen3Config

FOLDER = "metrics"
MFU = (
    "MFU = model FLOPs/s ÷ (devices × measured matmul FLOPs/s of one); model FLOPs = "
    "4 (P tokens + V D scored) + 12 L N H Σ length², base frozen"
)


# ------------------------------------------------------------------ work and its speed


class Work(NamedTuple):
    """How much a batch asks for; works add up."""

    tokens: float = 0.0
    scored: float = 0.0
    squares: float = 0.0  # Σ length²
    diffs: float = 0.0
    steps: float = 0.0

    def plus(self, other: "Work") -> "Work":
        """The sum, field by field."""
        return Work._make(a + b for a, b in zip(self, other, strict=True))


def count_work(batch: TokenBatch, *, share: float = 1.0, diffs: int = 0, steps: int = 1) -> Work:
    """Work of a batch of host arrays, with any leading axes; padding does not count.

    Args:
        share: the part of the whole batch that these rows are (a process holds its own rows only).
        diffs: finished with this batch.
        steps: optimizer steps in it.
    """
    lengths = np.asarray(batch.lengths, np.float64)
    scored = np.count_nonzero(np.asarray(batch.weight))
    sums = (lengths.sum() / share, scored / share, np.square(lengths).sum() / share)
    return Work(float(sums[0]), float(sums[1]), float(sums[2]), diffs, steps)


def forward_flops(config: Qwen3Config, work: Work) -> float:
    """FLOPs of the base's forward pass over this work: projections and head, scores and weighted values."""
    c = config
    weights = (
        c.num_projection_parameters() * work.tokens + c.hidden_size * c.vocab_size * work.scored
    )
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * work.squares
    return 2.0 * weights + 4.0 * attention


def train_flops(config: Qwen3Config, work: Work) -> float:
    """Model FLOPs of training on this work with a frozen base; the formula is in this module's docstring."""
    # Backward once more the same, and attention a third time.
    return 2 * forward_flops(config, work) + forward_flops(config, Work(squares=work.squares))


@functools.lru_cache
def matmul_flops(dtype: str) -> float:
    """FLOPs per second of one device in square matmuls of this dtype: the best of three.

    A float32 product is a full float32 product here, as in the model.
    """
    device = jax.local_devices()[0]
    n, repeats = (1024, 1) if device.platform == "cpu" else (4096, 32)

    @jax.jit
    def chain(x: jax.Array, y: jax.Array) -> jax.Array:
        body = lambda _, z: jnp.dot(z, y, precision="highest")  # noqa: E731
        return jax.lax.fori_loop(0, repeats, body, x)

    # This matrix is its own square: the numbers neither grow nor vanish.
    x = jax.device_put(jnp.full((n, n), 1 / n, dtype), device)
    chain(x, x).block_until_ready()
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        chain(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return repeats * 2.0 * n**3 / best


def count_devices(mesh: Any) -> int:
    """Devices that a mesh computes on; those of one host's CPU share its cores and count as one."""
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return len({device.process_index for device in devices})
    return len(devices)


def device_memory() -> dict[str, float]:
    """Bytes in use and their peak on this process's first device; on a CPU the peak of the process."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return {"process_peak_bytes": float(artifacts.peak_memory_bytes())}
    names = {"bytes_in_use": "device_bytes", "peak_bytes_in_use": "device_peak_bytes"}
    return {names[key]: float(stats[key]) for key in names if key in stats}


class Meter:
    """Speed between two calls of `lap`: add the work of every step, and call `lap` once its results are there.

    The first lap of a process holds the compilation, and says so with `compiled`: 1.
    """

    def __init__(self, config: Qwen3Config, mesh: Any = None):
        self._config, self._devices = config, count_devices(mesh)
        self._work, self._laps = Work(), 0
        self._start = time.perf_counter()

    def add(self, work: Work) -> None:
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
        # The clock starts after the ceiling is measured and the numbers are made: they are nobody's work.
        self._work, self._start = Work(), time.perf_counter()
        return rates


# ------------------------------------------------------------------ files


def read_records(file: Path) -> list[dict[str, Any]]:
    """Records of a metrics file, without a last line that a kill cut off."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"]), "time": float(record["time"])})
        except (ValueError, KeyError, TypeError):
            break
    return records


class Metrics:
    """Scalars of one stage over its steps, as JSON lines and for TensorBoard; a resumed run continues both.

    Args:
        folder: WORKDIR/metrics.
        name: of the stage.
        keep: which steps of an earlier process still hold (those before the checkpoint that this one goes
            on from). The others are dropped, since they come again: the curve stands there once.
        enabled: False on all processes but one; then nothing is written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        name: str,
        keep: Callable[[int], bool] = lambda step: False,
        enabled: bool = True,
    ):
        self.name, self._enabled = name, enabled
        self._file = Path(folder) / f"{name}.jsonl"
        if not enabled:
            return
        kept = {r["step"]: r for r in read_records(self._file) if keep(r["step"])}
        lines = [json.dumps(record) + "\n" for _, record in sorted(kept.items())]
        artifacts.write_text(self._file, "".join(lines))
        # An event file cannot be shortened: a new one is written from the records, and the old ones go.
        events = artifacts.make_dir(Path(folder) / "tensorboard" / name)
        current = events / f"events.out.tfevents.{len(kept):010d}.dit_jax"
        old = [file for file in events.glob("events.out.tfevents.*") if file != current]
        with artifacts.explain_os_errors("write", events):
            self._events = EventFile(current, time.time())
            self._lines = open(self._file, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        for record in sorted(kept.values(), key=lambda record: record["step"]):
            self._add_event(record)
        for file in old:
            file.unlink()
        self.flush()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds numbers of a step. Raises DitError when the disk is full."""
        if not self._enabled:
            return
        numbers = {name: float(value) for name, value in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **numbers}
        with artifacts.explain_os_errors("write", self._file):
            self._lines.write(json.dumps(record) + "\n")
            self._add_event(record)

    def _add_event(self, record: Mapping[str, Any]) -> None:
        scalars = {
            f"{self.name}/{key}": float(value)
            for key, value in record.items()
            if key not in ("step", "time")
        }
        self._events.write(record["step"], record["time"], scalars)

    def flush(self) -> None:
        """Hands everything to the file system. Raises DitError when the disk is full."""
        if self._enabled:
            with artifacts.explain_os_errors("write", self._file):
                self._lines.flush()
                self._events.flush()

    def close(self) -> None:
        if self._enabled:
            with artifacts.explain_os_errors("write", self._file):
                self._lines.close()
                self._events.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# ------------------------------------------------------------------ profiles


class Profile:
    """A trace of the steps [first, last) into a folder, for TensorBoard or Perfetto; (0, 0) is off.

        with Profile(folder, (10, 13)) as profile:
            for step in range(steps):
                profile.step(step, state)
                state = train_step(state)

    Each process traces its own devices. At the end of the range it waits for the results of the step before,
    so that the trace holds all that was dispatched: the one wait that a profile costs.

    Raises:
        DitError: `steps` are not two numbers.
    """

    def __init__(self, folder: str | os.PathLike[str], steps: Sequence[int] = (0, 0)):
        if len(steps) != 2:
            raise DitError(
                f"a profile takes two step numbers, not {tuple(steps)}: write profile=10,13"
            )
        self._folder, (self._first, self._last) = Path(folder), steps
        self._tracing = False

    def step(self, index: int, results: Any = None) -> None:
        """Comes before step `index`; `results` are those of the step before."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tracing:  # the range reaches to the end of the stage
            self._stop()
