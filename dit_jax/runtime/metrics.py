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

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from dit_jax.errors import DitError
from dit_jax.runtime import artifacts, processes
from dit_jax.runtime.event_file import EventFile
from dit_jax.runtime.os_errors import explain_os_errors

FOLDER = "metrics"


# ------------------------------------------------------------------ work and its speed


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
        with explain_os_errors("write", events):
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
        with explain_os_errors("write", self._file):
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
            with explain_os_errors("write", self._file):
                self._lines.flush()
                self._events.flush()

    def close(self) -> None:
        if self._enabled:
            with explain_os_errors("write", self._file):
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
