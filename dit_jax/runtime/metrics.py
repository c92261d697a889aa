"""What a run reports while it works: WORKDIR/metrics/<stage>.jsonl, and the same for TensorBoard.

    tensorboard --logdir WORKDIR/metrics

Nothing here waits for a device: the caller passes numbers that it has already fetched. Only process 0 writes.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_jax.formats.files import no_device
from dit_jax.formats.json_parser import BadJson, parse_json
from dit_jax.formats.json_shape import fits, is_count, is_number
from dit_jax.runtime import artifacts
from dit_jax.runtime.event_file import EventFile
from dit_jax.runtime.os_errors import explain_os_errors

FOLDER = "metrics"


def read_records(file: Path) -> list[dict[str, Any]]:
    """Records of a metrics file, up to a line that is damaged or that a kill cut off. Raises DitError: it is a pipe."""
    records = []
    text = no_device(file).read_text("utf-8", "replace") if file.exists() else ""
    for line in text.splitlines():
        try:
            record = parse_json(line)
        except BadJson:
            break
        if not (fits(record, {"step": is_count, "time": is_number}) and _is_record(record)):
            break
        records.append(record)
    return records


def _is_record(value: dict[str, Any]) -> bool:
    """Whether names and numbers are such as an event file can hold."""
    return all(
        key.isprintable() and is_number(number) and abs(number) < 1e38
        for key, number in value.items()
    )


class Metrics:
    """Scalars of one stage over its steps, as JSON lines and for TensorBoard; a resumed run continues both.

    Args:
        folder: WORKDIR/metrics.
        name: the stage.
        keep: which steps of an earlier process are kept (those before the checkpoint that this process resumes
            from). The others are dropped because they are run again.
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
        # An event file cannot be shortened: a new one is written from the records, and the old ones are deleted.
        events = artifacts.make_dir(Path(folder) / "tensorboard" / name)
        current = events / f"events.out.tfevents.{len(kept):010d}.dit_jax"
        old = [file for file in events.glob("events.out.tfevents.*") if file != current]
        with explain_os_errors("write", events):
            self._events = EventFile(current, time.time())
            self._lines = open(self._file, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        for _, record in sorted(kept.items()):
            self._add_event(record)
        for file in old:
            file.unlink()
        self.flush()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the numbers of one step. Raises DitError when the disk is full."""
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
        """Writes what is buffered. Raises DitError when the disk is full."""
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

    def __exit__(self, *error: object) -> None:
        self.close()
